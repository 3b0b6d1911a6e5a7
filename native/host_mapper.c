/* The host driver's fast path: a whole batch of page operations in one call.
 *
 * Plain C, plain ABI, no state, no threads, no allocation. Each function walks its arrays in order and joins
 * neighbours (consecutive addresses and offsets) into one system call. It returns 0 or the errno of the call that
 * failed, and *n_done says how many items took effect, so that the caller can undo exactly those.
 *
 * vmem_kv/driver/host_mapper.py states the same functions in Python; both pass the same tests.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE /* Linux 5.14; older C libraries do not name them */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

/* Bumped whenever a signature or its meaning changes; the Python side refuses any other number. */
int vmem_host_abi(void) {
    return 3;
}

static int fallocate_uninterrupted(int fd, int mode, int64_t offset, int64_t n_bytes) {
    while (fallocate(fd, mode, offset, n_bytes) != 0) {
        if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

/* Map over a reserved range. A new mapping does not inherit MADV_DONTFORK from what it replaces: without it a forked
 * child could write into the pages, and the range would no longer merge with the reservation around it. */
static int map_over(int64_t address, size_t n_bytes, int protection, int flags, int fd, int64_t offset) {
    void *start = (void *)(uintptr_t)address;
    if (mmap(start, n_bytes, protection, flags | MAP_FIXED, fd, offset) == MAP_FAILED) {
        return errno;
    }
    return madvise(start, n_bytes, MADV_DONTFORK) == 0 ? 0 : errno;
}

/* Without the advice an empty range is merely not merged with its surroundings: a child inherits nothing to touch. */
static int map_nothing_over(int64_t address, size_t n_bytes) {
    void *start = (void *)(uintptr_t)address;
    if (mmap(start, n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
        return errno;
    }
    (void)madvise(start, n_bytes, MADV_DONTFORK);
    return 0;
}

/* The number of items from `first` on whose offsets follow each other at page_bytes. */
static size_t offset_run(const int64_t *offsets, size_t first, size_t n, int64_t page_bytes) {
    size_t last = first + 1;
    while (last < n && offsets[last] == offsets[last - 1] + page_bytes) {
        last++;
    }
    return last - first;
}

static int fallocate_pages(int fd, int mode, const int64_t *offsets, size_t n, int64_t page_bytes, size_t *n_done) {
    for (*n_done = 0; *n_done < n;) {
        size_t run = offset_run(offsets, *n_done, n, page_bytes);
        int error = fallocate_uninterrupted(fd, mode, offsets[*n_done], (int64_t)run * page_bytes);
        if (error != 0) {
            return error;
        }
        *n_done += run;
    }
    return 0;
}

/* Back file pages with zeroed memory, so that a later touch cannot meet a full file system (SIGBUS). */
int vmem_host_create(int fd, const int64_t *offsets, size_t n, int64_t page_bytes, size_t *n_done) {
    return fallocate_pages(fd, 0, offsets, n, page_bytes, n_done);
}

/* Give file pages back to the system. */
int vmem_host_release(int fd, const int64_t *offsets, size_t n, int64_t page_bytes, size_t *n_done) {
    return fallocate_pages(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets, n, page_bytes, n_done);
}

/* Fill the page tables of a shared mapping. New memory is zeroed at the first touch, page by page, and for that to
 * write costs less (1.1 us per OS page against 1.5); memory that holds something is entered sixteen pages at a time if
 * it is read (0.4 us against 0.9), and may be written all the same. The first page speaks for all, since a run is
 * rarely of both kinds. The result does not matter: the pages are backed, and where the kernel does not know the
 * advice, the page tables fill at the first touch. */
static void fill_page_tables(void *start, size_t n_bytes) {
    unsigned char holds_something = 0;
    (void)mincore(start, 1, &holds_something);
    (void)madvise(start, n_bytes, (holds_something & 1) != 0 ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
}

/* Map file pages over reserved addresses, page tables filled at once. */
int vmem_host_map(int fd, const int64_t *addresses, const int64_t *offsets, size_t n, int64_t page_bytes,
                  size_t *n_done) {
    for (*n_done = 0; *n_done < n;) {
        size_t first = *n_done;
        size_t run = 1;
        while (first + run < n && addresses[first + run] == addresses[first + run - 1] + page_bytes &&
               offsets[first + run] == offsets[first + run - 1] + page_bytes) {
            run++;
        }
        size_t n_bytes = run * (size_t)page_bytes;
        int error = map_over(addresses[first], n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offsets[first]);
        if (error != 0) {
            (void)map_nothing_over(addresses[first], n_bytes); /* a run counts as done or it is not there */
            return error;
        }
        *n_done += run;
        fill_page_tables((void *)(uintptr_t)addresses[first], n_bytes);
    }
    return 0;
}

/* Turn ranges back into reservation by mapping nothing over them; never munmap, which would open a hole that
 * another thread's mmap could take. */
int vmem_host_unmap(const int64_t *addresses, const int64_t *lengths, size_t n, size_t *n_done) {
    for (*n_done = 0; *n_done < n; (*n_done)++) {
        int error = map_nothing_over(addresses[*n_done], (size_t)lengths[*n_done]);
        if (error != 0) {
            return error;
        }
    }
    return 0;
}
