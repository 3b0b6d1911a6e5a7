/* Reservations, memory handles, mappings and access, backed by a memfd per device.
 *
 *   reservation            PROT_NONE, no memory
 *   mapping, no access     the same: the handle is only written down
 *   mapping with access    the handle's part of the memfd, mapped shared, so that aliases are the same memory
 *
 * A touch of anything without access is therefore a real fault. Offsets in a memfd only grow and every one is used
 * once: handles created one after the other lie one after the other, and where they are mapped so as well, the system
 * holds one mapping. Freed memory leaves a hole behind.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

struct Handle {
    uint64_t id;
    int device;
    unsigned n_owners;   /* one for cuMemCreate, one for each cuMemRetainAllocationHandle */
    unsigned n_mappings; /* the memory goes when both are zero */
    int64_t offset;
    size_t n_bytes;
    bool fresh; /* to be filled with the pattern when first somebody may look */
};

struct Reservation {
    uint64_t start;
    uint64_t n_bytes;
};

struct Mapping {
    uint64_t start;
    uint64_t n_bytes;
    struct Handle *handle;
    int access; /* of the handle's device */
};

/* Both sorted by address; no two overlap. */
static struct Reservation *reservations;
static size_t n_reservations, reservations_capacity;
static struct Mapping *mappings;
static size_t n_mappings, mappings_capacity;
static size_t n_accessible; /* mappings with any access */

static size_t first_reservation_behind(uint64_t address) {
    size_t low = 0;
    for (size_t high = n_reservations; low < high;) {
        size_t middle = low + (high - low) / 2;
        if (reservations[middle].start + reservations[middle].n_bytes > address) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

/* The first mapping that ends behind the address: it holds the address, or is the next one. */
static size_t first_mapping_behind(uint64_t address) {
    size_t low = 0;
    for (size_t high = n_mappings; low < high;) {
        size_t middle = low + (high - low) / 2;
        if (mappings[middle].start + mappings[middle].n_bytes > address) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

/* Insert `n_item` zero bytes as item `index` of a sorted array. */
static void *with_gap(void *items, size_t *n, size_t *capacity, size_t index, size_t n_item) {
    char *grown = items;
    if (*n == *capacity) {
        *capacity = *capacity == 0 ? 64 : 2 * *capacity;
        grown = allocated(*capacity * n_item);
        if (*n > 0) {
            memcpy(grown, items, *n * n_item);
        }
        free(items);
    }
    memmove(grown + (index + 1) * n_item, grown + index * n_item, (*n - index) * n_item);
    (*n)++;
    return grown;
}

static bool overlaps_mapping(uint64_t address, uint64_t n_bytes) {
    size_t i = first_mapping_behind(address);
    return i < n_mappings && mappings[i].start < address + n_bytes;
}

/* Whether a range is one or more whole mappings without holes, and which: `count` from `first` on. */
static bool whole_mappings(uint64_t address, uint64_t n_bytes, size_t *first, size_t *count) {
    *first = first_mapping_behind(address);
    uint64_t next = address;
    for (*count = 0; next < address + n_bytes; (*count)++) {
        size_t i = *first + *count;
        if (i == n_mappings || mappings[i].start != next) {
            return false;
        }
        next += mappings[i].n_bytes;
    }
    return next == address + n_bytes;
}

/* A sum of address and size that wraps around is caught here for all calls that use it. */
static bool aligned_range(uint64_t address, uint64_t n_bytes) {
    uint64_t granularity = state.granularity_bytes;
    return n_bytes > 0 && address % granularity == 0 && n_bytes % granularity == 0 && address + n_bytes > address;
}

static CUresult misaligned(uint64_t address, uint64_t n_bytes) {
    return broken(RULE_ALIGNMENT, "address %#llx or size %#llx is no multiple of %#llx", (unsigned long long)address,
                  (unsigned long long)n_bytes, (unsigned long long)state.granularity_bytes);
}

/* A range of reserved addresses without memory. MADV_DONTFORK: a forked child has no use for any of it. */
static bool map_nothing_over(uint64_t address, uint64_t n_bytes) {
    void *start = (void *)(uintptr_t)address;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(start, n_bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) {
        return false;
    }
    (void)madvise(start, n_bytes, MADV_DONTFORK);
    return true;
}

static bool map_memory_over(uint64_t address, uint64_t n_bytes, int access, int file, int64_t offset) {
    void *start = (void *)(uintptr_t)address;
    int protection = access == MEM_ACCESS_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    if (mmap(start, n_bytes, protection, MAP_SHARED | MAP_FIXED, file, offset) == MAP_FAILED) {
        return false;
    }
    return madvise(start, n_bytes, MADV_DONTFORK) == 0;
}

CUresult memory_info(size_t *free_bytes, size_t *total_bytes) {
    if (free_bytes == NULL || total_bytes == NULL) {
        return broken(RULE_VALUE, "no room for the sizes");
    }
    uint64_t used_bytes = state.devices[current_device()].used_bytes;
    *total_bytes = state.memory_bytes;
    *free_bytes = used_bytes < state.memory_bytes ? state.memory_bytes - used_bytes : 0;
    return CUDA_SUCCESS;
}

/* Pinned memory of a device, shared with nobody: all that is emulated. */
static CUresult prop_checked(const CUmemAllocationProp *prop) {
    static const unsigned char nothing[4];
    if (prop == NULL) {
        return broken(RULE_VALUE, "no properties");
    }
    if (prop->type != MEM_ALLOCATION_TYPE_PINNED) {
        return broken(RULE_VALUE, "allocation type %d", prop->type);
    }
    if (prop->location.type != MEM_LOCATION_TYPE_DEVICE) {
        return broken(RULE_VALUE, "location type %d", prop->location.type);
    }
    if (prop->location.id < 0 || prop->location.id >= state.n_devices) {
        return broken(RULE_VALUE, "there is no device %d", prop->location.id);
    }
    if (prop->requestedHandleTypes != 0 || prop->win32HandleMetaData != NULL) {
        return broken(RULE_VALUE, "handle types %d cannot be exported", prop->requestedHandleTypes);
    }
    if (prop->allocFlags.compressionType != 0 || prop->allocFlags.usage != 0 ||
        prop->allocFlags.gpuDirectRDMACapable > 1 || memcmp(prop->allocFlags.reserved, nothing, 4) != 0) {
        return broken(RULE_VALUE, "unknown allocation flags");
    }
    return CUDA_SUCCESS;
}

CUresult memory_granularity(size_t *n_bytes, const CUmemAllocationProp *prop, int kind) {
    if (n_bytes == NULL || kind < 0 || kind > 1) {
        return broken(RULE_VALUE, "granularity kind %d", kind);
    }
    CUresult result = prop_checked(prop);
    if (result == CUDA_SUCCESS) {
        *n_bytes = state.granularity_bytes;
    }
    return result;
}

CUresult memory_reserve(CUdeviceptr *address, size_t n_bytes, size_t alignment, CUdeviceptr hint, uint64_t flags) {
    if (address == NULL || flags != 0) {
        return broken(RULE_VALUE, "flags %#llx", (unsigned long long)flags);
    }
    if (!aligned_range(hint, n_bytes)) {
        return misaligned(hint, n_bytes);
    }
    if ((alignment & (alignment - 1)) != 0) {
        return broken(RULE_ALIGNMENT, "alignment %#zx is no power of two", alignment);
    }
    if (alignment < state.granularity_bytes) {
        alignment = state.granularity_bytes;
    }
    size_t wide_bytes = n_bytes + alignment;
    int protection_flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *wide = wide_bytes < n_bytes ? MAP_FAILED
                                      : mmap((void *)(uintptr_t)hint, wide_bytes, PROT_NONE, protection_flags, -1, 0);
    if (wide == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    uint64_t start = ((uint64_t)(uintptr_t)wide + alignment - 1) & ~(uint64_t)(alignment - 1);
    size_t before = start - (uint64_t)(uintptr_t)wide;
    if (before > 0) {
        (void)munmap(wide, before);
    }
    (void)munmap((void *)(uintptr_t)(start + n_bytes), wide_bytes - before - n_bytes);
    (void)madvise((void *)(uintptr_t)start, n_bytes, MADV_DONTFORK);

    size_t index = first_reservation_behind(start);
    reservations = with_gap(reservations, &n_reservations, &reservations_capacity, index, sizeof *reservations);
    reservations[index] = (struct Reservation){start, n_bytes};
    *address = start;
    return CUDA_SUCCESS;
}

CUresult memory_free_reservation(CUdeviceptr address, size_t n_bytes) {
    size_t i = first_reservation_behind(address);
    if (i == n_reservations || reservations[i].start != address || reservations[i].n_bytes != n_bytes) {
        return broken(RULE_FREE_EXACT, "%#zx bytes at %#llx are no reservation", n_bytes, (unsigned long long)address);
    }
    if (overlaps_mapping(address, n_bytes)) {
        return broken(RULE_FREE_EMPTY, "something is mapped in the reservation at %#llx", (unsigned long long)address);
    }
    if (munmap((void *)(uintptr_t)address, n_bytes) != 0) {
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    memmove(&reservations[i], &reservations[i + 1], (--n_reservations - i) * sizeof *reservations);
    return CUDA_SUCCESS;
}

/* A sparse file of practically endless size; memory is taken by the pages that are touched. */
static CUresult open_memory_file(struct Device *device) {
    if (device->memory_file >= 0) {
        return CUDA_SUCCESS;
    }
    int file = memfd_create("emulated device memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, INT64_C(1) << 60) != 0) {
        if (file >= 0) {
            (void)close(file);
        }
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    device->memory_file = file;
    return CUDA_SUCCESS;
}

CUresult memory_create(CUmemGenericAllocationHandle *handle, size_t n_bytes, const CUmemAllocationProp *prop,
                       uint64_t flags) {
    if (handle == NULL || flags != 0) {
        return broken(RULE_VALUE, "flags %#llx", (unsigned long long)flags);
    }
    CUresult result = prop_checked(prop);
    if (result != CUDA_SUCCESS) {
        return result;
    }
    if (!aligned_range(0, n_bytes)) {
        return misaligned(0, n_bytes);
    }
    struct Device *device = &state.devices[prop->location.id];
    if (device->used_bytes > state.memory_bytes || n_bytes > state.memory_bytes - device->used_bytes) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    result = open_memory_file(device);
    if (result != CUDA_SUCCESS) {
        return result;
    }
    struct Handle *created = allocated(sizeof *created);
    created->device = prop->location.id;
    created->n_owners = 1;
    created->offset = device->next_offset;
    created->n_bytes = n_bytes;
    created->fresh = !state.zero_new_pages;
    created->id = table_add(&state.memory, created);
    device->next_offset += (int64_t)n_bytes;
    device->used_bytes += n_bytes;
    *handle = created->id;
    return CUDA_SUCCESS;
}

static void free_if_unused(struct Handle *handle) {
    if (handle->n_owners > 0 || handle->n_mappings > 0) {
        return;
    }
    struct Device *device = &state.devices[handle->device];
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    while (fallocate(device->memory_file, mode, handle->offset, (off_t)handle->n_bytes) != 0 && errno == EINTR) {
    }
    device->used_bytes -= handle->n_bytes;
    table_remove(&state.memory, handle->id);
    free(handle);
}

/* A handle that only mappings keep alive is not the caller's any more. */
static struct Handle *owned_handle(uint64_t id) {
    struct Handle *handle = table_get(&state.memory, id);
    return handle != NULL && handle->n_owners > 0 ? handle : NULL;
}

static bool handle_in_use(const struct Handle *handle) {
    for (size_t i = 0; handle->n_mappings > 0 && i < n_mappings; i++) {
        if (mappings[i].handle == handle && streams_use(mappings[i].start, mappings[i].n_bytes)) {
            return true;
        }
    }
    return false;
}

CUresult memory_release(CUmemGenericAllocationHandle id) {
    struct Handle *handle = owned_handle(id);
    if (handle == NULL) {
        return broken(RULE_HANDLE, "%#llx is no live handle", (unsigned long long)id);
    }
    if (handle_in_use(handle)) {
        return broken(RULE_IN_USE, "unfinished work uses the memory of handle %#llx", (unsigned long long)id);
    }
    handle->n_owners--;
    free_if_unused(handle);
    return CUDA_SUCCESS;
}

CUresult memory_map(CUdeviceptr address, size_t n_bytes, size_t offset, CUmemGenericAllocationHandle id,
                    uint64_t flags) {
    if (flags != 0) {
        return broken(RULE_VALUE, "flags %#llx", (unsigned long long)flags);
    }
    if (!aligned_range(address, n_bytes)) {
        return misaligned(address, n_bytes);
    }
    if (offset != 0) {
        return broken(RULE_OFFSET, "offset %#zx", offset);
    }
    struct Handle *handle = owned_handle(id);
    if (handle == NULL) {
        return broken(RULE_HANDLE, "%#llx is no live handle", (unsigned long long)id);
    }
    if (n_bytes != handle->n_bytes) {
        return broken(RULE_HANDLE_SIZE, "%#zx bytes of a handle of %#zx", n_bytes, handle->n_bytes);
    }
    size_t i = first_reservation_behind(address);
    if (i == n_reservations || address < reservations[i].start ||
        address + n_bytes > reservations[i].start + reservations[i].n_bytes) {
        return broken(RULE_MAP_RESERVED, "%#zx bytes at %#llx are not inside one reservation", n_bytes,
                      (unsigned long long)address);
    }
    if (overlaps_mapping(address, n_bytes)) {
        return broken(RULE_MAP_FREE, "something is mapped at %#llx", (unsigned long long)address);
    }
    size_t index = first_mapping_behind(address);
    mappings = with_gap(mappings, &n_mappings, &mappings_capacity, index, sizeof *mappings);
    mappings[index] = (struct Mapping){address, n_bytes, handle, MEM_ACCESS_NONE};
    handle->n_mappings++;
    return CUDA_SUCCESS;
}

CUresult memory_unmap(CUdeviceptr address, size_t n_bytes) {
    size_t first, count;
    if (!aligned_range(address, n_bytes)) {
        return misaligned(address, n_bytes);
    }
    if (!whole_mappings(address, n_bytes, &first, &count)) {
        return broken(RULE_UNMAP_WHOLE, "%#zx bytes at %#llx are not whole mappings without holes", n_bytes,
                      (unsigned long long)address);
    }
    if (streams_use(address, n_bytes)) {
        return broken(RULE_IN_USE, "unfinished work uses %#zx bytes at %#llx", n_bytes, (unsigned long long)address);
    }
    if (!map_nothing_over(address, n_bytes)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (size_t i = first; i < first + count; i++) {
        n_accessible -= mappings[i].access != MEM_ACCESS_NONE;
        mappings[i].handle->n_mappings--;
        free_if_unused(mappings[i].handle);
    }
    n_mappings -= count;
    memmove(&mappings[first], &mappings[first + count], (n_mappings - first) * sizeof *mappings);
    return CUDA_SUCCESS;
}

/* New memory holds anything: a pattern that no code mistakes for zeros. It is written when first somebody may see it.
 */
static bool filled(struct Handle *handle) {
    char pattern[1 << 16];
    if (!handle->fresh) {
        return true;
    }
    memset(pattern, 0xA5, sizeof pattern);
    for (size_t done = 0; done < handle->n_bytes;) {
        size_t left = handle->n_bytes - done;
        ssize_t n = pwrite(state.devices[handle->device].memory_file, pattern,
                           left < sizeof pattern ? left : sizeof pattern, handle->offset + (off_t)done);
        if (n < 0 && errno != EINTR) {
            return false;
        }
        done += n < 0 ? 0 : (size_t)n;
    }
    handle->fresh = false;
    return true;
}

/* Show or hide the memory of neighbouring mappings that follow each other in one memfd, `n_bytes` in all. */
static bool protect(const struct Mapping *first, uint64_t n_bytes, int access) {
    const struct Handle *handle = first->handle;
    return access == MEM_ACCESS_NONE ? map_nothing_over(first->start, n_bytes)
                                     : map_memory_over(first->start, n_bytes, access,
                                                       state.devices[handle->device].memory_file, handle->offset);
}

/* One system call for each run whose access changes. */
static bool protect_runs(size_t first, size_t end, int access) {
    for (size_t i = first, next; i < end; i = next) {
        uint64_t n_bytes = mappings[i].n_bytes;
        for (next = i + 1; next < end && mappings[next].access != access &&
                           mappings[next].handle->offset == mappings[i].handle->offset + (int64_t)n_bytes;
             next++) {
            n_bytes += mappings[next].n_bytes;
        }
        if (mappings[i].access != access && !protect(&mappings[i], n_bytes, access)) {
            return false;
        }
    }
    return true;
}

CUresult memory_set_access(CUdeviceptr address, size_t n_bytes, const CUmemAccessDesc *descs, size_t n_descs) {
    size_t first, count;
    if (descs == NULL || n_descs != 1) {
        return broken(RULE_VALUE, "%zu access descriptions", n_descs);
    }
    int access = descs->flags;
    if (access != MEM_ACCESS_NONE && access != MEM_ACCESS_READ && access != MEM_ACCESS_READWRITE) {
        return broken(RULE_VALUE, "access flags %d", access);
    }
    if (descs->location.type != MEM_LOCATION_TYPE_DEVICE) {
        return broken(RULE_VALUE, "location type %d", descs->location.type);
    }
    if (!aligned_range(address, n_bytes)) {
        return misaligned(address, n_bytes);
    }
    if (!whole_mappings(address, n_bytes, &first, &count)) {
        return broken(RULE_ACCESS_WHOLE, "%#zx bytes at %#llx are not whole mappings without holes", n_bytes,
                      (unsigned long long)address);
    }
    size_t n_new = 0;
    bool loses_access = false;
    for (size_t i = first; i < first + count; i++) {
        if (mappings[i].handle->device != descs->location.id) {
            return broken(RULE_ACCESS_DEVICE, "device %d and memory of device %d", descs->location.id,
                          mappings[i].handle->device);
        }
        n_new += mappings[i].access == MEM_ACCESS_NONE && access != MEM_ACCESS_NONE;
        loses_access |= (mappings[i].access & ~access) != 0;
    }
    if (loses_access && streams_use(address, n_bytes)) {
        return broken(RULE_IN_USE, "unfinished work uses %#zx bytes at %#llx", n_bytes, (unsigned long long)address);
    }
    if (n_accessible + n_new > state.max_mappings) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (size_t i = first; access != MEM_ACCESS_NONE && i < first + count; i++) {
        if (!filled(mappings[i].handle)) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
    }
    if (!protect_runs(first, first + count, access)) {
        for (size_t i = first; i < first + count; i++) {
            if (mappings[i].access != access) {
                (void)protect(&mappings[i], mappings[i].n_bytes, mappings[i].access);
            }
        }
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (size_t i = first; i < first + count; i++) {
        n_accessible -= mappings[i].access != MEM_ACCESS_NONE;
        n_accessible += access != MEM_ACCESS_NONE;
        mappings[i].access = access;
    }
    return CUDA_SUCCESS;
}

static struct Mapping *mapping_at(uint64_t address) {
    size_t i = first_mapping_behind(address);
    return i < n_mappings && mappings[i].start <= address ? &mappings[i] : NULL;
}

CUresult memory_get_access(uint64_t *flags, const CUmemLocation *location, CUdeviceptr address) {
    if (flags == NULL || location == NULL || location->type != MEM_LOCATION_TYPE_DEVICE) {
        return broken(RULE_VALUE, "no device location, or no room for the flags");
    }
    const struct Mapping *mapping = mapping_at(address);
    if (mapping == NULL) {
        return broken(RULE_VALUE, "nothing is mapped at %#llx", (unsigned long long)address);
    }
    *flags = mapping->handle->device == location->id ? (uint64_t)mapping->access : MEM_ACCESS_NONE;
    return CUDA_SUCCESS;
}

CUresult memory_retain_handle(CUmemGenericAllocationHandle *handle, CUdeviceptr address) {
    const struct Mapping *mapping = mapping_at(address);
    if (handle == NULL || mapping == NULL) {
        return broken(RULE_VALUE, "nothing is mapped at %#llx", (unsigned long long)address);
    }
    mapping->handle->n_owners++;
    *handle = mapping->handle->id;
    return CUDA_SUCCESS;
}

/* An address outside of everything is an honest question, not a broken rule. */
CUresult memory_pointer_attribute(void *value, int attribute, CUdeviceptr address) {
    enum { MEMORY_TYPE = 2, DEVICE_ORDINAL = 9, RANGE_START_ADDR = 11, RANGE_SIZE = 12, MAPPED = 13 };
    enum { MEMORY_TYPE_HOST = 1, MEMORY_TYPE_DEVICE = 2 };
    if (value != NULL && attribute == MEMORY_TYPE && pinned_at(address)) {
        *(unsigned *)value = MEMORY_TYPE_HOST;
        return CUDA_SUCCESS;
    }
    size_t i = first_reservation_behind(address);
    if (value == NULL || i == n_reservations || reservations[i].start > address) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const struct Mapping *mapping = mapping_at(address);
    if (attribute == MAPPED) {
        *(int *)value = mapping != NULL;
    } else if (attribute == RANGE_START_ADDR) {
        *(uint64_t *)value = reservations[i].start;
    } else if (attribute == RANGE_SIZE) {
        *(size_t *)value = reservations[i].n_bytes;
    } else if (attribute == MEMORY_TYPE && mapping != NULL) {
        *(unsigned *)value = MEMORY_TYPE_DEVICE;
    } else if (attribute == DEVICE_ORDINAL && mapping != NULL) {
        *(int *)value = mapping->handle->device;
    } else {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

bool memory_is_device(uint64_t address, size_t n_bytes) {
    size_t i = first_reservation_behind(address);
    return i < n_reservations && (reservations[i].start < address + n_bytes || address + n_bytes < address);
}

bool memory_is_accessible(int device, uint64_t address, size_t n_bytes, int access) {
    uint64_t next = address;
    if (address + n_bytes < address) {
        return false;
    }
    for (size_t i = first_mapping_behind(address); next < address + n_bytes; i++) {
        if (i == n_mappings || mappings[i].start > next || mappings[i].handle->device != device ||
            (mappings[i].access & access) != access) {
            return false;
        }
        next = mappings[i].start + mappings[i].n_bytes;
    }
    return true;
}

uint64_t memory_n_mappings(void) {
    return n_mappings;
}

uint64_t memory_n_reservations(void) {
    return n_reservations;
}

void memory_reset(void) {
    for (size_t i = 0; i < n_reservations; i++) {
        (void)munmap((void *)(uintptr_t)reservations[i].start, reservations[i].n_bytes);
    }
    n_reservations = n_mappings = n_accessible = 0;
    for (uint32_t slot = 0; slot < state.memory.n_slots; slot++) {
        struct Handle *handle = table_at(&state.memory, slot);
        if (handle != NULL) {
            handle->n_owners = handle->n_mappings = 0;
            free_if_unused(handle);
        }
    }
    for (int i = 0; i < MAX_DEVICES; i++) {
        if (state.devices[i].memory_file >= 0) {
            (void)close(state.devices[i].memory_file);
        }
        state.devices[i].memory_file = -1;
        state.devices[i].next_offset = 0;
    }
}
