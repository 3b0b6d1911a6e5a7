/* What the files of the emulator share: one state, under one lock.
 *
 *   api.c       the entry points that callers resolve, and what every one of them checks first
 *   contexts.c  devices, primary contexts, each thread's stack of contexts
 *   memory.c    reservations, handles, mappings, access: a memfd per device under mmap
 *   pinned.c    registered host memory
 *   streams.c   streams, events, queued work
 *   state.c     the state itself, rule violations, live ids
 *   controls.c  what tests turn: planned failures, limits, held streams, counts
 *
 * Every function below runs with the lock held, unless it says otherwise.
 */
#ifndef VMEM_EMULATOR_H
#define VMEM_EMULATOR_H

#include <pthread.h>
#include <stdbool.h>

#include "cuda_abi.h"
#include "rules.h"

/* Hidden by -fvisibility=hidden but for these: the symbol that bindings look up, and the controls. */
#define EXPORTED __attribute__((visibility("default")))

enum { MAX_DEVICES = 8, MAX_VIOLATIONS = 256, VIOLATION_CHARS = 240 };

/* What a call needs before it begins: bits, and the combinations that calls have. */
enum { NEEDS_INIT = 1, NEEDS_CONTEXT = 2, NEEDS_VIRTUAL_MEMORY = 4, OUTLIVES_STICKY = 8 };
enum Needs {
    NOTHING = 0,
    TEXT = OUTLIVES_STICKY, /* constants: no state of a device shows in them */
    INIT = NEEDS_INIT,
    BOOKS = INIT | OUTLIVES_STICKY, /* which context is current: no work of a device shows in it */
    CONTEXT = INIT | NEEDS_CONTEXT,
    VIRTUAL_INIT = INIT | NEEDS_VIRTUAL_MEMORY,
    VIRTUAL = CONTEXT | NEEDS_VIRTUAL_MEMORY,
};

/* Every emulated entry point: X(name, needs). */
#define CALLS(X)                                                                                                       \
    X(cuGetErrorName, TEXT)                                                                                            \
    X(cuGetErrorString, TEXT)                                                                                          \
    X(cuInit, NOTHING)                                                                                                 \
    X(cuDriverGetVersion, TEXT)                                                                                        \
    X(cuDeviceGet, INIT)                                                                                               \
    X(cuDeviceGetCount, INIT)                                                                                          \
    X(cuDeviceGetName, INIT)                                                                                           \
    X(cuDeviceGetUuid, INIT)                                                                                           \
    X(cuDeviceGetAttribute, INIT)                                                                                      \
    X(cuDeviceTotalMem, INIT)                                                                                          \
    X(cuDeviceCanAccessPeer, INIT)                                                                                     \
    X(cuDevicePrimaryCtxRetain, INIT)                                                                                  \
    X(cuDevicePrimaryCtxRelease, INIT)                                                                                 \
    X(cuDevicePrimaryCtxGetState, INIT)                                                                                \
    X(cuCtxGetCurrent, BOOKS)                                                                                          \
    X(cuCtxSetCurrent, BOOKS)                                                                                          \
    X(cuCtxPushCurrent, BOOKS)                                                                                         \
    X(cuCtxPopCurrent, BOOKS)                                                                                          \
    X(cuCtxGetDevice, CONTEXT)                                                                                         \
    X(cuCtxSynchronize, CONTEXT)                                                                                       \
    X(cuCtxGetStreamPriorityRange, CONTEXT)                                                                            \
    X(cuMemGetInfo, CONTEXT)                                                                                           \
    X(cuMemGetAllocationGranularity, VIRTUAL_INIT)                                                                     \
    X(cuMemAddressReserve, VIRTUAL)                                                                                    \
    X(cuMemAddressFree, VIRTUAL)                                                                                       \
    X(cuMemCreate, VIRTUAL)                                                                                            \
    X(cuMemRelease, VIRTUAL)                                                                                           \
    X(cuMemMap, VIRTUAL)                                                                                               \
    X(cuMemUnmap, VIRTUAL)                                                                                             \
    X(cuMemSetAccess, VIRTUAL)                                                                                         \
    X(cuMemGetAccess, VIRTUAL)                                                                                         \
    X(cuMemRetainAllocationHandle, VIRTUAL)                                                                            \
    X(cuPointerGetAttribute, CONTEXT)                                                                                  \
    X(cuMemHostRegister, CONTEXT)                                                                                      \
    X(cuMemHostUnregister, CONTEXT)                                                                                    \
    X(cuMemsetD8, CONTEXT)                                                                                             \
    X(cuMemsetD8Async, CONTEXT)                                                                                        \
    X(cuMemsetD32, CONTEXT)                                                                                            \
    X(cuMemsetD32Async, CONTEXT)                                                                                       \
    X(cuMemcpy, CONTEXT)                                                                                               \
    X(cuMemcpyAsync, CONTEXT)                                                                                          \
    X(cuMemcpyDtoD, CONTEXT)                                                                                           \
    X(cuMemcpyDtoDAsync, CONTEXT)                                                                                      \
    X(cuMemcpyDtoH, CONTEXT)                                                                                           \
    X(cuMemcpyDtoHAsync, CONTEXT)                                                                                      \
    X(cuMemcpyHtoD, CONTEXT)                                                                                           \
    X(cuMemcpyHtoDAsync, CONTEXT)                                                                                      \
    X(cuStreamCreate, CONTEXT)                                                                                         \
    X(cuStreamCreateWithPriority, CONTEXT)                                                                             \
    X(cuStreamDestroy, CONTEXT)                                                                                        \
    X(cuStreamSynchronize, CONTEXT)                                                                                    \
    X(cuStreamQuery, CONTEXT)                                                                                          \
    X(cuStreamWaitEvent, CONTEXT)                                                                                      \
    X(cuStreamIsCapturing, CONTEXT)                                                                                    \
    X(cuEventCreate, CONTEXT)                                                                                          \
    X(cuEventDestroy, CONTEXT)                                                                                         \
    X(cuEventRecord, CONTEXT)                                                                                          \
    X(cuEventQuery, INIT)                                                                                              \
    X(cuEventSynchronize, INIT)                                                                                        \
    X(cuEventElapsedTime, INIT)                                                                                        \
    X(cuThreadExchangeStreamCaptureMode, BOOKS)

enum Call {
#define X(name, needs) CALL_##name,
    CALLS(X)
#undef X
        N_CALLS
};

/* Live things under ids that are never given out twice and carry their kind, so that no stale or foreign id passes. */
enum Kind { KIND_MEMORY = 8, KIND_STREAM = 9, KIND_EVENT = 10 };

struct Table {
    enum Kind kind;
    struct Slot *slots;
    uint32_t n_slots;
    uint32_t first_free; /* slot number + 1; 0 where all are taken */
    uint32_t n_live;
};

/* Where an event was recorded last: shared by the event, the queued record and whoever waits for it. */
struct Mark {
    int n_owners;
    bool done;
    uint64_t done_ns; /* when, by a clock that never goes back */
};

struct Stream {
    struct Stream *next;
    uint64_t id; /* 0 for a device's default stream */
    int device;
    bool blocking; /* takes turns with the default stream */
    bool held;
    bool capturing; /* work goes into a graph that nobody launches */
    bool destroyed; /* goes when its last work is done */
    struct Work *first, *last;
};

struct Device {
    uint32_t generation; /* of the primary context: a new one for each time it comes to life */
    unsigned n_retained;
    int memory_file; /* memfd; -1 until the first page is created */
    int64_t next_offset;
    uint64_t used_bytes;
};

struct Plan {
    uint64_t n_calls;
    uint64_t fail_at; /* the n_calls at which to fail; 0 for never */
    bool fail_on;     /* from then on */
    bool fail_all;    /* every other call as well from then on */
    CUresult code;
    uint64_t delay_us;
};

struct State {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* some work is done, or everything is over */
    uint64_t epoch;         /* counts resets */
    bool active;            /* somebody asked for the emulator, and did not merely load a library */
    bool real_device;       /* one was found when the library was loaded */
    bool planted_device;    /* one was found where a test told us to look */
    bool initialized;
    enum Call call; /* the one that runs */
    struct Plan plans[N_CALLS];

    struct Device devices[MAX_DEVICES];
    int n_devices;
    uint64_t memory_bytes; /* of each device */
    uint64_t max_mappings; /* accessible ones, of all devices together */
    uint64_t granularity_bytes;
    uint64_t max_pinned_bytes; /* host memory that may be registered */
    bool virtual_memory;
    bool zero_new_pages;
    CUresult sticky;

    struct Table memory, streams, events;
    struct Stream *all_streams; /* default streams and those with unfinished work included */
    uint64_t sequence;          /* of the work queued last */

    uint64_t n_violations;
    char violations[MAX_VIOLATIONS][VIOLATION_CHARS];
};

extern struct State state;

/* state.c */
void state_init(void);                         /* defaults; nothing is live */
bool looks_like_real_device(const char *root); /* needs no lock */
const char *call_name(enum Call call);         /* needs no lock */
enum Needs call_needs(enum Call call);         /* needs no lock */
CUresult broken(enum Rule rule, const char *format, ...) __attribute__((format(printf, 2, 3)));
void *allocated(size_t n_bytes); /* zeroed; aborts where there is none */
uint64_t table_add(struct Table *table, void *object);
void *table_get(const struct Table *table, uint64_t id); /* NULL for an id that is not live */
void table_remove(struct Table *table, uint64_t id);
void *table_at(const struct Table *table, uint32_t slot); /* NULL for a free slot; slots are 0..n_slots-1 */

/* api.c */
bool in_forked_child(void); /* needs no lock */

/* contexts.c */
int current_device(void); /* of the calling thread's context; -1 where it has none or a dead one */
CUresult device_checked(CUdevice device);
CUresult device_attribute(int *value, int attribute, CUdevice device);
CUresult device_name(char *name, int n_chars, CUdevice device);
CUresult device_uuid(CUuuid *uuid, CUdevice device);
CUresult primary_context_retain(CUcontext *context, CUdevice device);
CUresult primary_context_release(CUdevice device);
CUresult primary_context_state(CUdevice device, unsigned *flags, int *active);
CUresult context_current(CUcontext *context);
CUresult context_set(CUcontext context);
CUresult context_push(CUcontext context);
CUresult context_pop(CUcontext *context);

/* memory.c */
CUresult memory_info(size_t *free_bytes, size_t *total_bytes);
CUresult memory_granularity(size_t *n_bytes, const CUmemAllocationProp *prop, int kind);
CUresult memory_reserve(CUdeviceptr *address, size_t n_bytes, size_t alignment, CUdeviceptr hint, uint64_t flags);
CUresult memory_free_reservation(CUdeviceptr address, size_t n_bytes);
CUresult memory_create(CUmemGenericAllocationHandle *handle, size_t n_bytes, const CUmemAllocationProp *prop,
                       uint64_t flags);
CUresult memory_release(CUmemGenericAllocationHandle handle);
CUresult memory_map(CUdeviceptr address, size_t n_bytes, size_t offset, CUmemGenericAllocationHandle handle,
                    uint64_t flags);
CUresult memory_unmap(CUdeviceptr address, size_t n_bytes);
CUresult memory_set_access(CUdeviceptr address, size_t n_bytes, const CUmemAccessDesc *descs, size_t n_descs);
CUresult memory_get_access(uint64_t *flags, const CUmemLocation *location, CUdeviceptr address);
CUresult memory_retain_handle(CUmemGenericAllocationHandle *handle, CUdeviceptr address);
CUresult memory_pointer_attribute(void *value, int attribute, CUdeviceptr address);
bool memory_is_device(uint64_t address, size_t n_bytes);                             /* touches a reservation */
bool memory_is_accessible(int device, uint64_t address, size_t n_bytes, int access); /* all of it */
uint64_t memory_n_mappings(void);
uint64_t memory_n_reservations(void);
void memory_reset(void);

/* pinned.c */
CUresult pinned_register(uint64_t address, size_t n_bytes, unsigned flags);
CUresult pinned_unregister(uint64_t address);
bool pinned_at(uint64_t address);
bool pinned_cuts(uint64_t address, size_t n_bytes); /* a range is registered in part, or lies in two of them */
uint64_t pinned_count(void);
uint64_t pinned_bytes(void);
bool pinned_left(int device); /* registered in its context */
void pinned_reset(void);

/* streams.c */
enum Side { HOST, DEVICE, EITHER };
CUresult stream_create(CUstream *stream, unsigned flags);
CUresult stream_destroy(CUstream stream);
CUresult stream_query(CUstream stream);
CUresult stream_synchronize(CUstream stream); /* gives the lock up while it waits */
CUresult stream_wait_event(CUstream stream, CUevent event, unsigned flags);
CUresult stream_is_capturing(CUstream stream, int *status);
CUresult context_synchronize(void); /* gives the lock up while it waits */
CUresult stream_fill(CUstream stream, CUdeviceptr address, uint32_t value, size_t value_bytes, size_t n_values);
CUresult stream_copy(CUstream stream, uint64_t target, enum Side target_side, uint64_t source, enum Side source_side,
                     size_t n_bytes);
CUresult event_create(CUevent *event, unsigned flags);
CUresult event_destroy(CUevent event);
CUresult event_record(CUevent event, CUstream stream);
CUresult event_query(CUevent event);
CUresult event_synchronize(CUevent event); /* gives the lock up while it waits */
CUresult event_elapsed(float *milliseconds, CUevent start, CUevent end);
CUresult capture_mode_exchange(int *mode);
struct Stream *stream_of(uint64_t id, int device);                              /* NULL for one that is not live */
void stream_queue_use(struct Stream *stream, uint64_t address, size_t n_bytes); /* as a kernel would: for tests */
void streams_pump(void);                                                        /* run what may run now */
bool streams_use(uint64_t address, size_t n_bytes);                             /* unfinished work touches it */
bool streams_left(int device); /* live streams, live events or unfinished work of its context */
bool streams_busy(void);       /* any unfinished work */
void streams_reset(void);      /* drops all work unrun */

#endif
