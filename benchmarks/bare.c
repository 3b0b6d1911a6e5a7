/* The system calls that any demand-mapped cache must make for a page, and nothing else: back it, map it.
 * benchmarks/allocator.py builds this where there is a compiler. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

/* Back and map `n` ranges of `n_bytes` each, every one at its own address as the offset. Returns 0 or errno. */
int bare_grow(int fd, const int64_t *places, size_t n, int64_t n_bytes) {
    for (size_t i = 0; i < n; i++) {
        if (fallocate(fd, 0, places[i], n_bytes) != 0) {
            return errno;
        }
    }
    for (size_t i = 0; i < n; i++) {
        if (mmap((void *)(uintptr_t)places[i], (size_t)n_bytes, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, places[i]) == MAP_FAILED) {
            return errno;
        }
    }
    return 0;
}
