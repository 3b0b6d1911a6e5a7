/* Devices, their primary contexts, and each thread's stack of current contexts. */
#include <stdio.h>
#include <string.h>

#include "emulator.h"

/* A context that a thread made current. It is dead when the last user released it, and stays so when another user
 * retains it again: the thread has to make it current anew. */
struct Frame {
    int device; /* -1 for "no context", which may be current too */
    uint32_t generation;
};

enum { MAX_FRAMES = 16 };
static _Thread_local struct Frame frames[MAX_FRAMES];
static _Thread_local int n_frames;
static _Thread_local uint64_t frames_epoch;

/* A reset reaches no other thread's stack: each thread empties its own when it comes by next. */
static void forget_frames_of_old(void) {
    if (frames_epoch != state.epoch) {
        frames_epoch = state.epoch;
        n_frames = 0;
    }
}

int current_device(void) {
    forget_frames_of_old();
    if (n_frames == 0 || frames[n_frames - 1].device < 0) {
        return -1;
    }
    const struct Frame *top = &frames[n_frames - 1];
    const struct Device *device = &state.devices[top->device];
    return device->n_retained > 0 && device->generation == top->generation ? top->device : -1;
}

CUresult device_checked(CUdevice device) {
    if (device < 0 || device >= state.n_devices) {
        return broken(RULE_DEVICE, "there is no device %d", device);
    }
    return CUDA_SUCCESS;
}

CUresult device_attribute(int *value, int attribute, CUdevice device) {
    enum {
        MAX_THREADS_PER_BLOCK = 1,
        WARP_SIZE = 10,
        MULTIPROCESSOR_COUNT = 16,
        PCI_BUS_ID = 33,
        UNIFIED_ADDRESSING = 41,
        COMPUTE_CAPABILITY_MAJOR = 75,
        VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
        HOST_NUMA_ID = 134,
        LAST_ATTRIBUTE = 200,
    };
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (value == NULL || attribute < 1 || attribute > LAST_ATTRIBUTE) {
        return broken(RULE_VALUE, "attribute %d", attribute);
    }
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    case WARP_SIZE:
        *value = 32;
        break;
    case MULTIPROCESSOR_COUNT:
    case UNIFIED_ADDRESSING:
        *value = 1;
        break;
    case PCI_BUS_ID:
        *value = device;
        break;
    case COMPUTE_CAPABILITY_MAJOR:
        *value = 9;
        break;
    case VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        *value = state.virtual_memory;
        break;
    case HOST_NUMA_ID:
        *value = -1;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult device_name(char *name, int n_chars, CUdevice device) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (name == NULL || n_chars <= 0) {
        return broken(RULE_VALUE, "no room for a name");
    }
    (void)snprintf(name, (size_t)n_chars, "Emulated device %d", device);
    return CUDA_SUCCESS;
}

CUresult device_uuid(CUuuid *uuid, CUdevice device) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (uuid == NULL) {
        return broken(RULE_VALUE, "no room for a UUID");
    }
    memcpy(uuid->bytes, "emulated-device", 15);
    uuid->bytes[15] = (char)device;
    return CUDA_SUCCESS;
}

CUresult primary_context_retain(CUcontext *context, CUdevice device) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (context == NULL) {
        return broken(RULE_VALUE, "no room for a context");
    }
    if (state.devices[device].n_retained++ == 0) {
        state.devices[device].generation++;
    }
    *context = &state.devices[device];
    return CUDA_SUCCESS;
}

CUresult primary_context_release(CUdevice device) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (state.devices[device].n_retained == 0) {
        return broken(RULE_CONTEXT_RETAINED, "nobody retained the context of device %d", device);
    }
    if (state.devices[device].n_retained == 1 && (streams_left(device) || pinned_left(device))) {
        return broken(RULE_CONTEXT_IDLE, "device %d has streams, events, registered memory or unfinished work", device);
    }
    state.devices[device].n_retained--;
    return CUDA_SUCCESS;
}

CUresult primary_context_state(CUdevice device, unsigned *flags, int *active) {
    if (device_checked(device) != CUDA_SUCCESS) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (flags == NULL || active == NULL) {
        return broken(RULE_VALUE, "no room for the state");
    }
    *flags = 0;
    *active = state.devices[device].n_retained > 0;
    return CUDA_SUCCESS;
}

CUresult context_current(CUcontext *context) {
    if (context == NULL) {
        return broken(RULE_VALUE, "no room for a context");
    }
    int device = current_device();
    *context = device < 0 ? NULL : &state.devices[device];
    return CUDA_SUCCESS;
}

/* The frame for a context that somebody wants current; NULL stands for none. */
static CUresult frame_for(CUcontext context, struct Frame *frame) {
    *frame = (struct Frame){-1, 0};
    if (context == NULL) {
        return CUDA_SUCCESS;
    }
    for (int i = 0; i < state.n_devices; i++) {
        if (context == &state.devices[i] && context->n_retained > 0) {
            *frame = (struct Frame){i, context->generation};
            return CUDA_SUCCESS;
        }
    }
    return broken(RULE_CONTEXT_RETAINED, "%p is no retained context", (void *)context);
}

CUresult context_set(CUcontext context) {
    struct Frame frame;
    forget_frames_of_old();
    CUresult result = frame_for(context, &frame);
    if (result == CUDA_SUCCESS) {
        n_frames = n_frames == 0 ? 1 : n_frames;
        frames[n_frames - 1] = frame;
    }
    return result;
}

CUresult context_push(CUcontext context) {
    struct Frame frame;
    forget_frames_of_old();
    if (context == NULL || n_frames == MAX_FRAMES) {
        return broken(RULE_VALUE, context == NULL ? "no context" : "%d contexts are pushed already", MAX_FRAMES);
    }
    CUresult result = frame_for(context, &frame);
    if (result == CUDA_SUCCESS) {
        frames[n_frames++] = frame;
    }
    return result;
}

CUresult context_pop(CUcontext *context) {
    int device = current_device();
    if (n_frames == 0) {
        return broken(RULE_CONTEXT, "there is nothing to pop");
    }
    n_frames--;
    if (context != NULL) {
        *context = device < 0 ? NULL : &state.devices[device];
    }
    return CUDA_SUCCESS;
}
