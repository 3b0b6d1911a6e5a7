/* The entry points of the emulated CUDA driver, and what each of them checks before it does anything.
 *
 * What it is: a libcuda.so.1 for tests, over plain memory (memory.c) and queues (streams.c), stricter than hardware
 * (rules.h has the table of rules). It knows the calls that a virtual-memory driver needs and no kernels.
 * What it guarantees: a call that fails changes nothing; any thread may call; one lock, given up while a call waits.
 * What it assumes: nothing of who loads it. Whoever finds it by accident finds nothing: it is inert until
 * vmem_emulator_activate (controls.c), and beside an NVIDIA device for ever. Then no call is found, and all fail.
 */
#define _GNU_SOURCE
#include <string.h>
#include <time.h>

#include "emulator.h"

enum { DRIVER_VERSION = 13000 };

static volatile bool forked_child; /* CUDA does not survive a fork, and neither does our lock */

static void after_fork(void) {
    forked_child = true;
}

__attribute__((constructor)) static void when_loaded(void) {
    for (int i = 0; i < MAX_DEVICES; i++) {
        state.devices[i].memory_file = -1;
    }
    state.real_device = looks_like_real_device("/");
    state_init();
    (void)pthread_atfork(NULL, NULL, after_fork);
}

bool in_forked_child(void) {
    return forked_child;
}

/* A planned failure, or what every call has to have first. */
static CUresult admit(enum Call call, const struct Plan *plan) {
    enum Needs needs = call_needs(call);
    if (plan->fail_at != 0 && (plan->n_calls == plan->fail_at || (plan->fail_on && plan->n_calls > plan->fail_at))) {
        if (plan->fail_all) {
            state.sticky = plan->code;
            (void)pthread_cond_broadcast(&state.changed);
        }
        return plan->code;
    }
    if (state.sticky != CUDA_SUCCESS && (needs & OUTLIVES_STICKY) == 0) {
        return state.sticky;
    }
    if ((needs & NEEDS_INIT) != 0 && !state.initialized) {
        return broken(RULE_INIT, "before cuInit");
    }
    if ((needs & NEEDS_CONTEXT) != 0 && current_device() < 0) {
        return broken(RULE_CONTEXT, "the calling thread has no live context");
    }
    if ((needs & NEEDS_VIRTUAL_MEMORY) != 0 && !state.virtual_memory) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

/* Whether calls may do anything at all. */
static bool is_inert(void) {
    return !state.active || state.real_device || state.planted_device;
}

/* Begin a call. With CUDA_SUCCESS the lock is held until `leave`. */
static CUresult enter(enum Call call) {
    if (forked_child) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    (void)pthread_mutex_lock(&state.lock);
    struct Plan *plan = &state.plans[call];
    plan->n_calls++;
    struct Plan as_called = *plan;
    uint64_t epoch = state.epoch;
    if (as_called.delay_us > 0) {
        (void)pthread_mutex_unlock(&state.lock);
        struct timespec delay = {(time_t)(as_called.delay_us / 1000000), (long)(as_called.delay_us % 1000000) * 1000};
        (void)nanosleep(&delay, NULL);
        (void)pthread_mutex_lock(&state.lock);
    }
    state.call = call;
    CUresult result = CUDA_ERROR_DEINITIALIZED; /* after a reset while it slept: what was planned is not any more */
    if (is_inert()) {
        result = CUDA_ERROR_STUB_LIBRARY;
    } else if (state.epoch == epoch) {
        result = admit(call, &as_called);
    }
    if (result != CUDA_SUCCESS) {
        (void)pthread_mutex_unlock(&state.lock);
    }
    return result;
}

static CUresult leave(CUresult result) {
    (void)pthread_mutex_unlock(&state.lock);
    return result;
}

/* An entry point: its parameters, and what it does with the lock held. */
#define ENTRY(name, parameters, action)                                                                                \
    static CUresult name parameters {                                                                                  \
        CUresult entered = enter(CALL_##name);                                                                         \
        return entered != CUDA_SUCCESS ? entered : leave(action);                                                      \
    }

/* ---- without a device ---- */

static const struct {
    CUresult result;
    const char *name, *text;
} results[] = {
#define X(name, number, text) {CUDA_##name, "CUDA_" #name, text},
    CUDA_RESULTS(X)
#undef X
};

static CUresult describe(CUresult result, const char **name, const char **text) {
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        if (results[i].result == result) {
            *name = results[i].name;
            *text = results[i].text;
            return CUDA_SUCCESS;
        }
    }
    *name = *text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

static CUresult describe_one(CUresult result, const char **wanted, bool by_name) {
    const char *name, *text;
    if (wanted == NULL) {
        return broken(RULE_VALUE, "no room for a text");
    }
    CUresult known = describe(result, &name, &text);
    *wanted = by_name ? name : text;
    return known;
}

static CUresult init(unsigned flags) {
    if (flags != 0) {
        return broken(RULE_VALUE, "flags %#x", flags);
    }
    if (state.n_devices == 0) {
        return CUDA_ERROR_NO_DEVICE;
    }
    state.initialized = true;
    return CUDA_SUCCESS;
}

static CUresult answer(int *place, int value) {
    if (place == NULL) {
        return broken(RULE_VALUE, "no room for the answer");
    }
    *place = value;
    return CUDA_SUCCESS;
}

/* To ask for a device that is not there is how callers find out. */
static CUresult device_get(CUdevice *device, int ordinal) {
    return ordinal < 0 || ordinal >= state.n_devices ? CUDA_ERROR_INVALID_DEVICE : answer(device, ordinal);
}

static CUresult total_memory(size_t *n_bytes, CUdevice device) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (n_bytes == NULL) {
        return broken(RULE_VALUE, "no room for the size");
    }
    *n_bytes = state.memory_bytes;
    return CUDA_SUCCESS;
}

static CUresult can_access_peer(int *can, CUdevice device, CUdevice peer) {
    bool exist = device_checked(device) == CUDA_SUCCESS && device_checked(peer) == CUDA_SUCCESS;
    return exist ? answer(can, 0) : CUDA_ERROR_INVALID_DEVICE;
}

ENTRY(cuGetErrorName, (CUresult result, const char **name), describe_one(result, name, true))
ENTRY(cuGetErrorString, (CUresult result, const char **text), describe_one(result, text, false))
ENTRY(cuInit, (unsigned flags), init(flags))
ENTRY(cuDriverGetVersion, (int *version), answer(version, DRIVER_VERSION))
ENTRY(cuDeviceGetCount, (int *count), answer(count, state.n_devices))

/* ---- devices and contexts ---- */

static CUresult priority_range(int *least, int *greatest) {
    CUresult result = least == NULL ? CUDA_SUCCESS : answer(least, 0);
    return greatest == NULL ? result : answer(greatest, -1);
}

ENTRY(cuDeviceGet, (CUdevice * device, int ordinal), device_get(device, ordinal))
ENTRY(cuDeviceGetName, (char *name, int n_chars, CUdevice device), device_name(name, n_chars, device))
ENTRY(cuDeviceGetUuid, (CUuuid * uuid, CUdevice device), device_uuid(uuid, device))
ENTRY(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device), device_attribute(value, attribute, device))
ENTRY(cuDeviceTotalMem, (size_t *n_bytes, CUdevice device), total_memory(n_bytes, device))
ENTRY(cuDeviceCanAccessPeer, (int *can, CUdevice device, CUdevice peer), can_access_peer(can, device, peer))
ENTRY(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device), primary_context_retain(context, device))
ENTRY(cuDevicePrimaryCtxRelease, (CUdevice device), primary_context_release(device))
ENTRY(cuDevicePrimaryCtxGetState, (CUdevice device, unsigned *flags, int *active),
      primary_context_state(device, flags, active))
ENTRY(cuCtxGetCurrent, (CUcontext * context), context_current(context))
ENTRY(cuCtxSetCurrent, (CUcontext context), context_set(context))
ENTRY(cuCtxPushCurrent, (CUcontext context), context_push(context))
ENTRY(cuCtxPopCurrent, (CUcontext * context), context_pop(context))
ENTRY(cuCtxGetDevice, (CUdevice * device), answer(device, current_device()))
ENTRY(cuCtxSynchronize, (void), context_synchronize())
ENTRY(cuCtxGetStreamPriorityRange, (int *least, int *greatest), priority_range(least, greatest))

/* ---- virtual memory ---- */

ENTRY(cuMemGetInfo, (size_t *free_bytes, size_t *total_bytes), memory_info(free_bytes, total_bytes))
ENTRY(cuMemGetAllocationGranularity, (size_t *n_bytes, const CUmemAllocationProp *prop, int kind),
      memory_granularity(n_bytes, prop, kind))
ENTRY(cuMemAddressReserve, (CUdeviceptr * address, size_t n_bytes, size_t alignment, CUdeviceptr hint, uint64_t flags),
      memory_reserve(address, n_bytes, alignment, hint, flags))
ENTRY(cuMemAddressFree, (CUdeviceptr address, size_t n_bytes), memory_free_reservation(address, n_bytes))
ENTRY(cuMemCreate,
      (CUmemGenericAllocationHandle * handle, size_t n_bytes, const CUmemAllocationProp *prop, uint64_t flags),
      memory_create(handle, n_bytes, prop, flags))
ENTRY(cuMemRelease, (CUmemGenericAllocationHandle handle), memory_release(handle))
ENTRY(cuMemMap,
      (CUdeviceptr address, size_t n_bytes, size_t offset, CUmemGenericAllocationHandle handle, uint64_t flags),
      memory_map(address, n_bytes, offset, handle, flags))
ENTRY(cuMemUnmap, (CUdeviceptr address, size_t n_bytes), memory_unmap(address, n_bytes))
ENTRY(cuMemSetAccess, (CUdeviceptr address, size_t n_bytes, const CUmemAccessDesc *descs, size_t n_descs),
      memory_set_access(address, n_bytes, descs, n_descs))
ENTRY(cuMemGetAccess, (uint64_t *flags, const CUmemLocation *location, CUdeviceptr address),
      memory_get_access(flags, location, address))
ENTRY(cuMemRetainAllocationHandle, (CUmemGenericAllocationHandle * handle, void *address),
      memory_retain_handle(handle, (CUdeviceptr)(uintptr_t)address))
ENTRY(cuPointerGetAttribute, (void *value, int attribute, CUdeviceptr address),
      memory_pointer_attribute(value, attribute, address))

static uint64_t number(const void *pointer) {
    return (uint64_t)(uintptr_t)pointer;
}

ENTRY(cuMemHostRegister, (void *address, size_t n_bytes, unsigned flags),
      pinned_register(number(address), n_bytes, flags))
ENTRY(cuMemHostUnregister, (void *address), pinned_unregister(number(address)))

/* ---- fills and copies: a synchronous form queues on the default stream, and a copy waits there ---- */

static CUresult then_wait(CUresult queued) {
    return queued != CUDA_SUCCESS ? queued : stream_synchronize(0);
}

ENTRY(cuMemsetD8, (CUdeviceptr target, unsigned char value, size_t n), stream_fill(0, target, value, 1, n))
ENTRY(cuMemsetD8Async, (CUdeviceptr target, unsigned char value, size_t n, CUstream stream),
      stream_fill(stream, target, value, 1, n))
ENTRY(cuMemsetD32, (CUdeviceptr target, unsigned value, size_t n), stream_fill(0, target, value, 4, n))
ENTRY(cuMemsetD32Async, (CUdeviceptr target, unsigned value, size_t n, CUstream stream),
      stream_fill(stream, target, value, 4, n))
ENTRY(cuMemcpy, (CUdeviceptr target, CUdeviceptr source, size_t n_bytes),
      then_wait(stream_copy(0, target, EITHER, source, EITHER, n_bytes)))
ENTRY(cuMemcpyAsync, (CUdeviceptr target, CUdeviceptr source, size_t n_bytes, CUstream stream),
      stream_copy(stream, target, EITHER, source, EITHER, n_bytes))
ENTRY(cuMemcpyDtoD, (CUdeviceptr target, CUdeviceptr source, size_t n_bytes),
      then_wait(stream_copy(0, target, DEVICE, source, DEVICE, n_bytes)))
ENTRY(cuMemcpyDtoDAsync, (CUdeviceptr target, CUdeviceptr source, size_t n_bytes, CUstream stream),
      stream_copy(stream, target, DEVICE, source, DEVICE, n_bytes))
ENTRY(cuMemcpyDtoH, (void *target, CUdeviceptr source, size_t n_bytes),
      then_wait(stream_copy(0, number(target), HOST, source, DEVICE, n_bytes)))
ENTRY(cuMemcpyDtoHAsync, (void *target, CUdeviceptr source, size_t n_bytes, CUstream stream),
      stream_copy(stream, number(target), HOST, source, DEVICE, n_bytes))
ENTRY(cuMemcpyHtoD, (CUdeviceptr target, const void *source, size_t n_bytes),
      then_wait(stream_copy(0, target, DEVICE, number(source), HOST, n_bytes)))
ENTRY(cuMemcpyHtoDAsync, (CUdeviceptr target, const void *source, size_t n_bytes, CUstream stream),
      stream_copy(stream, target, DEVICE, number(source), HOST, n_bytes))

/* ---- streams and events ---- */

ENTRY(cuStreamCreate, (CUstream * stream, unsigned flags), stream_create(stream, flags))
ENTRY(cuStreamCreateWithPriority, (CUstream * stream, unsigned flags, int priority),
      ((void)priority, stream_create(stream, flags)))
ENTRY(cuStreamDestroy, (CUstream stream), stream_destroy(stream))
ENTRY(cuStreamSynchronize, (CUstream stream), stream_synchronize(stream))
ENTRY(cuStreamQuery, (CUstream stream), stream_query(stream))
ENTRY(cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned flags), stream_wait_event(stream, event, flags))
ENTRY(cuStreamIsCapturing, (CUstream stream, int *status), stream_is_capturing(stream, status))
ENTRY(cuEventCreate, (CUevent * event, unsigned flags), event_create(event, flags))
ENTRY(cuEventDestroy, (CUevent event), event_destroy(event))
ENTRY(cuEventRecord, (CUevent event, CUstream stream), event_record(event, stream))
ENTRY(cuEventQuery, (CUevent event), event_query(event))
ENTRY(cuEventSynchronize, (CUevent event), event_synchronize(event))
ENTRY(cuEventElapsedTime, (float *milliseconds, CUevent start, CUevent end), event_elapsed(milliseconds, start, end))
ENTRY(cuThreadExchangeStreamCaptureMode, (int *mode), capture_mode_exchange(mode))

/* ---- how callers find them ---- */

static void (*const functions[N_CALLS])(void) = {
#define X(name, needs) (void (*)(void)) name,
    CALLS(X)
#undef X
};

/* Bindings ask for a base name and the CUDA version whose signature they will use. The names that changed their
 * signature in CUDA 13 are known in the older one only. */
static bool is_known(const char *name, int version) {
    bool is_changed = strcmp(name, "cuCtxSynchronize") == 0 || strcmp(name, "cuCtxGetDevice") == 0;
    return !is_changed || version < 13000;
}

/* Find an entry point: the one exported call. `found` gets a function pointer, `status` may be NULL. */
EXPORTED CUresult cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    (void)flags; /* per-thread default streams: refused when a call uses one */
    if (name == NULL || found == NULL) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *found = NULL;
    if (!state.active || state.real_device) {
        return CUDA_ERROR_STUB_LIBRARY;
    }
    for (int i = 0; i < N_CALLS; i++) {
        if (strcmp(name, call_name((enum Call)i)) == 0 && is_known(name, version)) {
            memcpy(found, &functions[i], sizeof *found);
        }
    }
    if (status != NULL) {
        *status = *found == NULL ? PROC_ADDRESS_SYMBOL_NOT_FOUND : PROC_ADDRESS_SUCCESS;
    }
    return *found == NULL ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
