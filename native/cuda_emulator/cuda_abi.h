/* The part of the CUDA driver's binary interface that is emulated: types, struct layouts, numbers.
 *
 * Declared here so that building needs no CUDA toolkit. Handles that the real interface spells as pointers to
 * incomplete types are integers of the same size: nobody may look behind them.
 */
#ifndef VMEM_CUDA_ABI_H
#define VMEM_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef uint64_t CUmemGenericAllocationHandle;
typedef uint64_t CUstream;
typedef uint64_t CUevent;
typedef struct Device *CUcontext; /* the primary context of that device; there are no others */

/* Every result that has a name here: X(name, number, text). */
#define CUDA_RESULTS(X)                                                                                                \
    X(SUCCESS, 0, "no error")                                                                                          \
    X(ERROR_INVALID_VALUE, 1, "invalid argument")                                                                      \
    X(ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                                         \
    X(ERROR_NOT_INITIALIZED, 3, "initialization error")                                                                \
    X(ERROR_DEINITIALIZED, 4, "driver shutting down")                                                                  \
    X(ERROR_STUB_LIBRARY, 34, "the loaded driver is a stub library")                                                   \
    X(ERROR_NO_DEVICE, 100, "no device")                                                                               \
    X(ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                                                             \
    X(ERROR_INVALID_CONTEXT, 201, "invalid device context")                                                            \
    X(ERROR_ECC_UNCORRECTABLE, 214, "uncorrectable memory error")                                                      \
    X(ERROR_PEER_ACCESS_UNSUPPORTED, 217, "devices cannot reach each other's memory")                                  \
    X(ERROR_CONTAINED, 226, "a contained memory error")                                                                \
    X(ERROR_OPERATING_SYSTEM, 304, "the operating system refused a call")                                              \
    X(ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                                            \
    X(ERROR_ILLEGAL_STATE, 401, "a resource is not in the right state")                                                \
    X(ERROR_NOT_FOUND, 500, "symbol not found")                                                                        \
    X(ERROR_NOT_READY, 600, "work is not finished")                                                                    \
    X(ERROR_ILLEGAL_ADDRESS, 700, "an illegal address was touched")                                                    \
    X(ERROR_LAUNCH_TIMEOUT, 702, "a launch ran too long")                                                              \
    X(ERROR_CONTEXT_IS_DESTROYED, 709, "the context is destroyed")                                                     \
    X(ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712, "host memory is registered already")                                  \
    X(ERROR_HOST_MEMORY_NOT_REGISTERED, 713, "host memory is not registered")                                          \
    X(ERROR_ILLEGAL_INSTRUCTION, 715, "an illegal instruction was met")                                                \
    X(ERROR_MISALIGNED_ADDRESS, 716, "a misaligned address was touched")                                               \
    X(ERROR_LAUNCH_FAILED, 719, "a launch failed")                                                                     \
    X(ERROR_TENSOR_MEMORY_LEAK, 721, "a kernel left tensor memory behind")                                             \
    X(ERROR_NOT_PERMITTED, 800, "not permitted")                                                                       \
    X(ERROR_NOT_SUPPORTED, 801, "not supported")                                                                       \
    X(ERROR_SYSTEM_NOT_READY, 802, "the system is not ready")                                                          \
    X(ERROR_MPS_CLIENT_TERMINATED, 810, "the MPS client was terminated")                                               \
    X(ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "not permitted while a stream is capturing")                              \
    X(ERROR_STREAM_CAPTURE_IMPLICIT, 906, "a capturing stream and the default stream would wait for each other")       \
    X(ERROR_CAPTURED_EVENT, 907, "the event was last recorded in a capturing stream")                                  \
    X(ERROR_EXTERNAL_DEVICE, 911, "an error of an external device")                                                    \
    X(ERROR_UNKNOWN, 999, "unknown error")

typedef enum {
#define X(name, number, text) CUDA_##name = number,
    CUDA_RESULTS(X)
#undef X
} CUresult;

enum { MEM_ALLOCATION_TYPE_PINNED = 1, MEM_LOCATION_TYPE_DEVICE = 1 };
enum { MEM_ACCESS_NONE = 0, MEM_ACCESS_READ = 1, MEM_ACCESS_READWRITE = 3 };
enum { HOST_REGISTER_PORTABLE = 1 };
enum { STREAM_NON_BLOCKING = 1, STREAM_LEGACY = 1, STREAM_PER_THREAD = 2 };
enum { EVENT_DISABLE_TIMING = 2, EVENT_INTERPROCESS = 4, EVENT_FLAGS = 7 };
enum { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1 };
enum { CAPTURE_MODE_GLOBAL = 0, CAPTURE_MODE_RELAXED = 2 };
enum { PROC_ADDRESS_SUCCESS = 0, PROC_ADDRESS_SYMBOL_NOT_FOUND = 1 };

typedef struct {
    char bytes[16];
} CUuuid;

typedef struct {
    int type;
    int id; /* the device's ordinal, where the type is DEVICE */
} CUmemLocation;

typedef struct {
    CUmemLocation location;
    int flags;
} CUmemAccessDesc;

typedef struct {
    int type;
    int requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType;
        unsigned char gpuDirectRDMACapable;
        unsigned short usage;
        unsigned char reserved[4];
    } allocFlags;
} CUmemAllocationProp;

_Static_assert(sizeof(CUmemAccessDesc) == 12 && sizeof(CUmemAllocationProp) == 32, "the layouts of cuda.h");

#endif
