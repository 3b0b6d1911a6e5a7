/* Streams, events and the work queued on them.
 *
 * Work runs as soon as nothing holds it back: usually inside the call that queued it. It is held back by a stream
 * that a test holds, by earlier work of its stream, by an event that its stream waits for, and between the default
 * stream and the blocking streams of a context by whatever was queued before it. Work reads and writes host memory
 * when it runs, never earlier.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emulator.h"

enum WorkKind { WORK_FILL, WORK_COPY, WORK_USE, WORK_RECORD, WORK_WAIT };

struct Work {
    struct Work *next;
    enum WorkKind kind;
    uint64_t sequence; /* grows over all streams */
    uint64_t target, source;
    size_t n_bytes; /* 0 for a record and a wait */
    uint32_t value; /* of a fill */
    size_t value_bytes;
    struct Mark *mark; /* of a record and a wait */
};

struct Event {
    uint64_t id;
    int device;
    bool timed;
    bool captured;     /* recorded last in a capturing stream: a node of a graph, which never happens */
    struct Mark *mark; /* NULL until it is recorded */
};

static void mark_drop(struct Mark *mark) {
    if (mark != NULL && --mark->n_owners == 0) {
        free(mark);
    }
}

static struct Mark *mark_share(struct Mark *mark) {
    mark->n_owners++;
    return mark;
}

/* ---- running ---- */

static bool taking_turns(const struct Stream *one, const struct Stream *other) {
    return one != other && one->device == other->device && one->blocking && other->blocking &&
           (one->id == 0 || other->id == 0);
}

static bool may_run(const struct Stream *stream) {
    const struct Work *work = stream->first;
    if (work == NULL || stream->held || (work->kind == WORK_WAIT && !work->mark->done)) {
        return false;
    }
    for (const struct Stream *other = state.all_streams; other != NULL; other = other->next) {
        if (taking_turns(stream, other) && other->first != NULL && other->first->sequence < work->sequence) {
            return false;
        }
    }
    return true;
}

static uint64_t now_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void run(const struct Work *work) {
    char *target = (char *)(uintptr_t)work->target;
    switch (work->kind) {
    case WORK_FILL:
        if (work->value_bytes == 1) {
            memset(target, (int)work->value, work->n_bytes);
        }
        for (size_t i = 0; work->value_bytes > 1 && i < work->n_bytes; i += work->value_bytes) {
            memcpy(target + i, &work->value, work->value_bytes);
        }
        break;
    case WORK_COPY:
        memcpy(target, (const char *)(uintptr_t)work->source, work->n_bytes);
        break;
    case WORK_RECORD:
        work->mark->done = true;
        work->mark->done_ns = now_ns();
        break;
    case WORK_USE:
    case WORK_WAIT:
        break;
    }
}

static void drop_first(struct Stream *stream) {
    struct Work *work = stream->first;
    stream->first = work->next;
    if (stream->first == NULL) {
        stream->last = NULL;
    }
    mark_drop(work->mark);
    free(work);
}

static void forget_finished_streams(void) {
    for (struct Stream **link = &state.all_streams; *link != NULL;) {
        struct Stream *stream = *link;
        if (stream->destroyed && stream->first == NULL) {
            *link = stream->next;
            free(stream);
        } else {
            link = &stream->next;
        }
    }
}

void streams_pump(void) {
    bool progress = true;
    while (progress) {
        progress = false;
        for (struct Stream *stream = state.all_streams; stream != NULL; stream = stream->next) {
            while (may_run(stream)) {
                run(stream->first);
                drop_first(stream);
                progress = true;
            }
        }
    }
    forget_finished_streams();
    (void)pthread_cond_broadcast(&state.changed);
}

static void queue(struct Stream *stream, struct Work work) {
    if (stream->capturing) { /* graphs are not emulated: what goes into one is forgotten */
        mark_drop(work.mark);
        return;
    }
    struct Work *queued = allocated(sizeof *queued);
    *queued = work;
    queued->sequence = ++state.sequence;
    if (stream->last == NULL) {
        stream->first = queued;
    } else {
        stream->last->next = queued;
    }
    stream->last = queued;
    streams_pump();
}

/* ---- streams ---- */

static struct Stream *add_stream(int device, bool blocking) {
    struct Stream *stream = allocated(sizeof *stream);
    stream->device = device;
    stream->blocking = blocking;
    stream->next = state.all_streams;
    state.all_streams = stream;
    return stream;
}

struct Stream *stream_of(uint64_t id, int device) {
    if (id != 0 && id != STREAM_LEGACY) {
        struct Stream *stream = table_get(&state.streams, id);
        return stream != NULL && stream->device == device ? stream : NULL;
    }
    for (struct Stream *stream = state.all_streams; stream != NULL; stream = stream->next) {
        if (stream->id == 0 && stream->device == device) {
            return stream;
        }
    }
    return add_stream(device, true); /* the default stream, at its first use */
}

/* The stream, if it is live and belongs to the current context. */
static CUresult stream_checked(CUstream id, struct Stream **stream) {
    if (id == STREAM_PER_THREAD) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    *stream = stream_of(id, current_device());
    if (*stream == NULL) {
        return broken(RULE_RESOURCE, "%#llx is no live stream of the current context", (unsigned long long)id);
    }
    return CUDA_SUCCESS;
}

CUresult stream_create(CUstream *stream, unsigned flags) {
    if (stream == NULL || (flags & ~(unsigned)STREAM_NON_BLOCKING) != 0) {
        return broken(RULE_VALUE, "stream flags %#x", flags);
    }
    struct Stream *created = add_stream(current_device(), (flags & STREAM_NON_BLOCKING) == 0);
    created->id = table_add(&state.streams, created);
    *stream = created->id;
    return CUDA_SUCCESS;
}

CUresult stream_destroy(CUstream id) {
    struct Stream *stream = table_get(&state.streams, id);
    if (stream == NULL || stream->device != current_device()) {
        return broken(RULE_RESOURCE, "%#llx is no live stream of the current context", (unsigned long long)id);
    }
    table_remove(&state.streams, id);
    stream->destroyed = true;
    forget_finished_streams();
    return CUDA_SUCCESS;
}

/* Nobody waits for a graph that is being written, nor asks how far it is. */
static CUresult not_capturing(const struct Stream *stream) {
    return stream->capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult stream_query(CUstream id) {
    struct Stream *stream;
    CUresult result = stream_checked(id, &stream);
    if (result == CUDA_SUCCESS) {
        result = not_capturing(stream);
    }
    if (result != CUDA_SUCCESS) {
        return result;
    }
    return stream->first == NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

/* Work queued up to `sequence` on one stream, or on all of a device where `stream` is NULL. The stream may be gone:
 * it is only compared, and one that took its place has later work. */
static bool has_work_up_to(uint64_t sequence, int device, const struct Stream *stream) {
    for (const struct Stream *other = state.all_streams; other != NULL; other = other->next) {
        if ((stream == NULL ? other->device == device : other == stream) && other->first != NULL &&
            other->first->sequence <= sequence) {
            return true;
        }
    }
    return false;
}

/* Wait for a change; an error when there will be none any more. */
static CUresult wait_for_change(uint64_t epoch) {
    (void)pthread_cond_wait(&state.changed, &state.lock);
    if (state.epoch != epoch) {
        return CUDA_ERROR_DEINITIALIZED;
    }
    return state.sticky;
}

static CUresult wait_for_work(int device, const struct Stream *stream) {
    uint64_t sequence = state.sequence, epoch = state.epoch;
    while (has_work_up_to(sequence, device, stream)) {
        CUresult result = wait_for_change(epoch);
        if (result != CUDA_SUCCESS) {
            return result;
        }
    }
    return CUDA_SUCCESS;
}

CUresult stream_synchronize(CUstream id) {
    struct Stream *stream;
    CUresult result = stream_checked(id, &stream);
    if (result == CUDA_SUCCESS) {
        result = not_capturing(stream);
    }
    return result != CUDA_SUCCESS ? result : wait_for_work(stream->device, stream);
}

CUresult context_synchronize(void) {
    return wait_for_work(current_device(), NULL);
}

CUresult stream_is_capturing(CUstream id, int *status) {
    struct Stream *stream;
    if (status == NULL) {
        return broken(RULE_VALUE, "no room for the status");
    }
    *status = CAPTURE_NONE;
    CUresult result = stream_checked(id, &stream);
    if (result != CUDA_SUCCESS) {
        return result;
    }
    for (const struct Stream *other = state.all_streams; other != NULL; other = other->next) {
        if (stream->id == 0 && other->capturing && taking_turns(stream, other)) {
            return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        }
    }
    *status = stream->capturing ? CAPTURE_ACTIVE : CAPTURE_NONE;
    return CUDA_SUCCESS;
}

CUresult capture_mode_exchange(int *mode) {
    static _Thread_local int of_this_thread = CAPTURE_MODE_GLOBAL;
    if (mode == NULL || *mode < CAPTURE_MODE_GLOBAL || *mode > CAPTURE_MODE_RELAXED) {
        return broken(RULE_VALUE, "no known capture mode");
    }
    int before = of_this_thread;
    of_this_thread = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

/* ---- fills and copies ---- */

static CUresult touch_checked(uint64_t address, size_t n_bytes, int access) {
    if (memory_is_accessible(current_device(), address, n_bytes, access)) {
        return CUDA_SUCCESS;
    }
    return broken(RULE_TOUCH, "device %d has no access to all of %#zx bytes at %#llx", current_device(), n_bytes,
                  (unsigned long long)address);
}

CUresult stream_fill(CUstream id, CUdeviceptr address, uint32_t value, size_t value_bytes, size_t n_values) {
    struct Stream *stream;
    CUresult result = stream_checked(id, &stream);
    if (result != CUDA_SUCCESS || n_values == 0) {
        return result;
    }
    if (address % value_bytes != 0) {
        return broken(RULE_ALIGNMENT, "address %#llx is no multiple of %zu", (unsigned long long)address, value_bytes);
    }
    size_t n_bytes = n_values > SIZE_MAX / value_bytes ? SIZE_MAX : n_values * value_bytes;
    result = touch_checked(address, n_bytes, MEM_ACCESS_READWRITE);
    if (result == CUDA_SUCCESS) {
        queue(
            stream,
            (struct Work){
                .kind = WORK_FILL, .target = address, .n_bytes = n_bytes, .value = value, .value_bytes = value_bytes});
    }
    return result;
}

static CUresult side_checked(uint64_t address, size_t n_bytes, enum Side side, int access) {
    bool is_device = memory_is_device(address, n_bytes);
    if (side == HOST && is_device) {
        return broken(RULE_COPY, "%#llx is device memory, not the host's", (unsigned long long)address);
    }
    if (side == HOST && address == 0) {
        return broken(RULE_VALUE, "no host memory");
    }
    if (!is_device && pinned_cuts(address, n_bytes)) {
        return broken(RULE_COPY, "%#zx bytes at %#llx cross the end of a registered range", n_bytes,
                      (unsigned long long)address);
    }
    return side == DEVICE || is_device ? touch_checked(address, n_bytes, access) : CUDA_SUCCESS;
}

CUresult stream_copy(CUstream id, uint64_t target, enum Side target_side, uint64_t source, enum Side source_side,
                     size_t n_bytes) {
    struct Stream *stream;
    CUresult result = stream_checked(id, &stream);
    if (result != CUDA_SUCCESS || n_bytes == 0) {
        return result;
    }
    result = side_checked(target, n_bytes, target_side, MEM_ACCESS_READWRITE);
    if (result == CUDA_SUCCESS) {
        result = side_checked(source, n_bytes, source_side, MEM_ACCESS_READ);
    }
    if (result == CUDA_SUCCESS && source < target + n_bytes && target < source + n_bytes) {
        result = broken(RULE_COPY, "%#zx bytes at %#llx and at %#llx overlap", n_bytes, (unsigned long long)source,
                        (unsigned long long)target);
    }
    if (result == CUDA_SUCCESS) {
        queue(stream, (struct Work){.kind = WORK_COPY, .target = target, .source = source, .n_bytes = n_bytes});
    }
    return result;
}

void stream_queue_use(struct Stream *stream, uint64_t address, size_t n_bytes) {
    queue(stream, (struct Work){.kind = WORK_USE, .target = address, .source = address, .n_bytes = n_bytes});
}

/* ---- events ---- */

static CUresult event_checked(CUevent id, struct Event **event) {
    *event = table_get(&state.events, id);
    if (*event == NULL) {
        return broken(RULE_RESOURCE, "%#llx is no live event", (unsigned long long)id);
    }
    return CUDA_SUCCESS;
}

CUresult event_create(CUevent *event, unsigned flags) {
    bool shared_and_timed = (flags & EVENT_INTERPROCESS) != 0 && (flags & EVENT_DISABLE_TIMING) == 0;
    if (event == NULL || (flags & ~(unsigned)EVENT_FLAGS) != 0 || shared_and_timed) {
        return broken(RULE_VALUE, "event flags %#x", flags);
    }
    struct Event *created = allocated(sizeof *created);
    created->device = current_device();
    created->timed = (flags & EVENT_DISABLE_TIMING) == 0;
    created->id = table_add(&state.events, created);
    *event = created->id;
    return CUDA_SUCCESS;
}

/* A queued record goes on without its event. */
CUresult event_destroy(CUevent id) {
    struct Event *event;
    CUresult result = event_checked(id, &event);
    if (result == CUDA_SUCCESS) {
        table_remove(&state.events, id);
        mark_drop(event->mark);
        free(event);
    }
    return result;
}

CUresult event_record(CUevent id, CUstream stream_id) {
    struct Stream *stream;
    struct Event *event;
    CUresult result = stream_checked(stream_id, &stream);
    if (result == CUDA_SUCCESS) {
        result = event_checked(id, &event);
    }
    if (result != CUDA_SUCCESS) {
        return result;
    }
    if (event->device != stream->device) {
        return broken(RULE_RESOURCE, "the event belongs to device %d, the stream to %d", event->device, stream->device);
    }
    mark_drop(event->mark);
    event->mark = NULL;
    event->captured = stream->capturing;
    if (event->captured) {
        return CUDA_SUCCESS;
    }
    event->mark = allocated(sizeof *event->mark);
    event->mark->n_owners = 1;
    queue(stream, (struct Work){.kind = WORK_RECORD, .mark = mark_share(event->mark)});
    return CUDA_SUCCESS;
}

CUresult event_query(CUevent id) {
    struct Event *event;
    CUresult result = event_checked(id, &event);
    if (result != CUDA_SUCCESS || event->captured) {
        return result != CUDA_SUCCESS ? result : CUDA_ERROR_CAPTURED_EVENT;
    }
    return event->mark == NULL || event->mark->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult event_synchronize(CUevent id) {
    struct Event *event;
    CUresult result = event_checked(id, &event);
    if (result == CUDA_SUCCESS && event->captured) {
        result = CUDA_ERROR_CAPTURED_EVENT;
    }
    if (result != CUDA_SUCCESS || event->mark == NULL) {
        return result;
    }
    struct Mark *mark = mark_share(event->mark); /* the event may be recorded anew or destroyed meanwhile */
    uint64_t epoch = state.epoch;
    while (result == CUDA_SUCCESS && !mark->done) {
        result = wait_for_change(epoch);
    }
    mark_drop(mark);
    return result;
}

/* An event with a time, recorded in a stream that runs. */
static CUresult timed_event_checked(CUevent id, struct Event **event) {
    CUresult result = event_checked(id, event);
    if (result == CUDA_SUCCESS && (*event)->captured) {
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    if (result == CUDA_SUCCESS && (!(*event)->timed || (*event)->mark == NULL)) {
        return broken(RULE_RESOURCE, "%#llx was made without timing, or never recorded", (unsigned long long)id);
    }
    return result;
}

CUresult event_elapsed(float *milliseconds, CUevent start_id, CUevent end_id) {
    struct Event *start, *end;
    if (milliseconds == NULL) {
        return broken(RULE_VALUE, "no room for the time");
    }
    CUresult result = timed_event_checked(start_id, &start);
    if (result == CUDA_SUCCESS) {
        result = timed_event_checked(end_id, &end);
    }
    if (result != CUDA_SUCCESS) {
        return result;
    }
    if (!start->mark->done || !end->mark->done) {
        return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = (float)((double)(int64_t)(end->mark->done_ns - start->mark->done_ns) / 1e6);
    return CUDA_SUCCESS;
}

CUresult stream_wait_event(CUstream stream_id, CUevent id, unsigned flags) {
    struct Stream *stream;
    struct Event *event;
    if (flags != 0) {
        return broken(RULE_VALUE, "flags %#x", flags);
    }
    CUresult result = stream_checked(stream_id, &stream);
    if (result == CUDA_SUCCESS) {
        result = event_checked(id, &event);
    }
    if (result == CUDA_SUCCESS && event->captured && !stream->capturing) {
        return CUDA_ERROR_NOT_SUPPORTED; /* it would make the stream capture as well */
    }
    if (result == CUDA_SUCCESS && event->mark != NULL) {
        queue(stream, (struct Work){.kind = WORK_WAIT, .mark = mark_share(event->mark)});
    }
    return result;
}

/* ---- for the other files ---- */

bool streams_use(uint64_t address, size_t n_bytes) {
    for (const struct Stream *stream = state.all_streams; stream != NULL; stream = stream->next) {
        for (const struct Work *work = stream->first; work != NULL; work = work->next) {
            bool writes = work->target < address + n_bytes && address < work->target + work->n_bytes;
            bool reads = work->source < address + n_bytes && address < work->source + work->n_bytes;
            if (work->n_bytes > 0 && (writes || reads)) {
                return true;
            }
        }
    }
    return false;
}

bool streams_left(int device) {
    for (const struct Stream *stream = state.all_streams; stream != NULL; stream = stream->next) {
        if (stream->device == device && (stream->id != 0 || stream->first != NULL)) {
            return true;
        }
    }
    for (uint32_t i = 0; i < state.events.n_slots; i++) {
        const struct Event *event = table_at(&state.events, i);
        if (event != NULL && event->device == device) {
            return true;
        }
    }
    return false;
}

bool streams_busy(void) {
    for (const struct Stream *stream = state.all_streams; stream != NULL; stream = stream->next) {
        if (stream->first != NULL) {
            return true;
        }
    }
    return false;
}

void streams_reset(void) {
    while (state.all_streams != NULL) {
        struct Stream *stream = state.all_streams;
        state.all_streams = stream->next;
        while (stream->first != NULL) {
            drop_first(stream);
        }
        if (stream->id != 0 && !stream->destroyed) {
            table_remove(&state.streams, stream->id);
        }
        free(stream);
    }
    for (uint32_t i = 0; i < state.events.n_slots; i++) {
        struct Event *event = table_at(&state.events, i);
        if (event != NULL) {
            (void)event_destroy(event->id);
        }
    }
}
