/* Host memory that is registered: the books of it, and no more. Copies reach all memory of the process anyway.
 *
 * What is registered must be there, and still be there when it is unregistered: whoever frees it before leaves the
 * device with addresses that the system hands to somebody else.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

struct Pinned {
    uint64_t start;
    uint64_t n_bytes;
    int device; /* of the context that registered it */
};

/* In no order; there are few. */
static struct Pinned *pinned;
static size_t n_pinned, pinned_capacity;

static struct Pinned *overlapping(uint64_t address, uint64_t n_bytes) {
    for (size_t i = 0; i < n_pinned; i++) {
        if (pinned[i].start < address + n_bytes && address < pinned[i].start + pinned[i].n_bytes) {
            return &pinned[i];
        }
    }
    return NULL;
}

/* Whether every page of a range is mapped in this process. */
static bool is_there(uint64_t address, uint64_t n_bytes) {
    return msync((void *)(uintptr_t)address, n_bytes, MS_ASYNC) == 0;
}

CUresult pinned_register(uint64_t address, size_t n_bytes, unsigned flags) {
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    if ((flags & ~(unsigned)HOST_REGISTER_PORTABLE) != 0) {
        return broken(RULE_VALUE, "registration flags %#x", flags);
    }
    if (address == 0 || n_bytes == 0 || address % page_bytes != 0 || n_bytes % page_bytes != 0 ||
        address + n_bytes < address) {
        return broken(RULE_HOST_RANGE, "%#zx bytes at %#llx are no whole OS pages", n_bytes,
                      (unsigned long long)address);
    }
    if (memory_is_device(address, n_bytes) || !is_there(address, n_bytes)) {
        return broken(RULE_HOST_RANGE, "%#zx bytes at %#llx are not all memory of the host", n_bytes,
                      (unsigned long long)address);
    }
    if (overlapping(address, n_bytes) != NULL) {
        return broken(RULE_HOST_FREE, "of %#zx bytes at %#llx some are registered", n_bytes,
                      (unsigned long long)address);
    }
    if (pinned_bytes() > state.max_pinned_bytes || n_bytes > state.max_pinned_bytes - pinned_bytes()) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (n_pinned == pinned_capacity) {
        pinned_capacity = pinned_capacity == 0 ? 64 : 2 * pinned_capacity;
        struct Pinned *grown = allocated(pinned_capacity * sizeof *grown);
        if (n_pinned > 0) {
            memcpy(grown, pinned, n_pinned * sizeof *grown);
        }
        free(pinned);
        pinned = grown;
    }
    pinned[n_pinned++] = (struct Pinned){address, n_bytes, current_device()};
    return CUDA_SUCCESS;
}

CUresult pinned_unregister(uint64_t address) {
    struct Pinned *found = overlapping(address, 1);
    if (found == NULL || found->start != address) {
        return broken(RULE_HOST_REGISTERED, "no registered range begins at %#llx", (unsigned long long)address);
    }
    if (!is_there(found->start, found->n_bytes)) {
        return broken(RULE_HOST_RANGE, "the host's memory at %#llx went while it was registered",
                      (unsigned long long)address);
    }
    if (streams_use(found->start, found->n_bytes)) {
        return broken(RULE_IN_USE, "unfinished work uses the host's memory at %#llx", (unsigned long long)address);
    }
    *found = pinned[--n_pinned];
    return CUDA_SUCCESS;
}

bool pinned_at(uint64_t address) {
    return overlapping(address, 1) != NULL;
}

bool pinned_cuts(uint64_t address, size_t n_bytes) {
    const struct Pinned *found = overlapping(address, n_bytes);
    return found != NULL && (address < found->start || address + n_bytes > found->start + found->n_bytes);
}

uint64_t pinned_count(void) {
    return n_pinned;
}

uint64_t pinned_bytes(void) {
    uint64_t n_bytes = 0;
    for (size_t i = 0; i < n_pinned; i++) {
        n_bytes += pinned[i].n_bytes;
    }
    return n_bytes;
}

bool pinned_left(int device) {
    for (size_t i = 0; i < n_pinned; i++) {
        if (pinned[i].device == device) {
            return true;
        }
    }
    return false;
}

void pinned_reset(void) {
    n_pinned = 0;
}
