/* What the emulator holds callers to: the one table of rules.
 *
 * X(NAME, result, text). A call that breaks a rule changes nothing, answers `result`, and is written down as
 * "NAME: call: what was wrong" in the list that tests assert to be empty. tests/cuda has a deliberately wrong caller
 * for each row. "Stricter" marks a row where hardware lets callers pass, or where what it does is not documented.
 */
#ifndef VMEM_RULES_H
#define VMEM_RULES_H

#define RULES(X)                                                                                                       \
    X(INIT, ERROR_NOT_INITIALIZED, "cuInit comes before every call but cuDriverGetVersion and the error texts")        \
    X(CONTEXT, ERROR_INVALID_CONTEXT,                                                                                  \
      "the calling thread has a live context, for all but device, context and granularity queries, primary contexts "  \
      "and the state of events (stricter: also for memory handles and mappings)")                                      \
    X(CONTEXT_RETAINED, ERROR_INVALID_CONTEXT, "only a retained primary context is released or made current")          \
    X(CONTEXT_IDLE, ERROR_INVALID_VALUE,                                                                               \
      "the last release of a context leaves no stream, event, registered host memory or unfinished work of it "        \
      "behind (stricter)")                                                                                             \
    X(DEVICE, ERROR_INVALID_DEVICE, "a device argument names an existing device")                                      \
    X(VALUE, ERROR_INVALID_VALUE,                                                                                      \
      "pointers for results are given; flags, kinds, properties and locations are known values (stricter: memory is "  \
      "pinned device memory that nobody exports, and access is given with one description)")                           \
    X(ALIGNMENT, ERROR_INVALID_VALUE,                                                                                  \
      "sizes are positive multiples of the granularity, addresses and offsets multiples (stricter: also in "           \
      "cuMemAddressReserve); an alignment is a power of two; 32-bit fills are aligned to 4 bytes")                     \
    X(OFFSET, ERROR_INVALID_VALUE, "the offset of a mapping is zero")                                                  \
    X(HANDLE, ERROR_INVALID_VALUE, "a memory handle is live, and is released once for each time it was obtained")      \
    X(HANDLE_SIZE, ERROR_INVALID_VALUE, "a mapping has the size of its handle (stricter)")                             \
    X(MAP_RESERVED, ERROR_INVALID_VALUE, "a mapping lies wholly inside one reservation")                               \
    X(MAP_FREE, ERROR_INVALID_VALUE, "nothing is mapped yet where a mapping goes")                                     \
    X(UNMAP_WHOLE, ERROR_INVALID_VALUE, "an unmapped range is one or more whole mappings without holes")               \
    X(ACCESS_WHOLE, ERROR_INVALID_VALUE, "a range that is given access is one or more whole mappings without holes")   \
    X(ACCESS_DEVICE, ERROR_INVALID_VALUE, "memory is made accessible to its own device only (stricter: no peers)")     \
    X(TOUCH, ERROR_INVALID_VALUE,                                                                                      \
      "fills and copies stay on mapped memory that the current context's device has access to")                        \
    X(COPY, ERROR_INVALID_VALUE,                                                                                       \
      "a copy goes the way its name says, between ranges that do not overlap, and crosses no end of registered host "  \
      "memory (stricter)")                                                                                             \
    X(IN_USE, ERROR_INVALID_VALUE,                                                                                     \
      "no unfinished work uses memory that is unmapped, released or unregistered, or loses access (stricter)")         \
    X(FREE_EXACT, ERROR_INVALID_VALUE, "a reservation is freed exactly as it was reserved")                            \
    X(FREE_EMPTY, ERROR_INVALID_VALUE, "nothing is mapped in a reservation that is freed (stricter)")                  \
    X(HOST_RANGE, ERROR_INVALID_VALUE,                                                                                 \
      "registered host memory is whole OS pages of this process, none of them a device's, and stays until it is "      \
      "unregistered (stricter)")                                                                                       \
    X(HOST_FREE, ERROR_HOST_MEMORY_ALREADY_REGISTERED, "no host memory is registered twice, not even in part")         \
    X(HOST_REGISTERED, ERROR_HOST_MEMORY_NOT_REGISTERED,                                                               \
      "host memory is unregistered once, by the address that it was registered with")                                  \
    X(RESOURCE, ERROR_INVALID_HANDLE, "a stream or an event is live, and belongs to the context it is used in")

enum Rule {
#define X(name, result, text) RULE_##name,
    RULES(X)
#undef X
        N_RULES
};

#endif
