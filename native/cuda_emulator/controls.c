/* What tests turn and read. vmem_kv/testing/emulator.py states the same functions in Python.
 *
 * Functions that return int answer 0, or one of the reasons below. None of them counts as a driver call.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "emulator.h"

enum { UNKNOWN_NAME = 1, BAD_VALUE = 2, SOMETHING_LIVES = 3, FORKED = 4 };

enum Setting {
    MEMORY_BYTES,
    MAX_LIVE_MAPPINGS,
    GRANULARITY,
    N_DEVICES,
    VIRTUAL_MEMORY,
    ZERO_NEW_PAGES,
    STICKY,
    PINNED_BYTES
};

enum Count { HANDLES, MAPPINGS, RESERVATIONS, STREAMS, EVENTS, CONTEXTS, PINNED, VIOLATIONS, UNFINISHED };

/* Bumped whenever a signature or its meaning changes; the Python side refuses any other number. */
EXPORTED int vmem_emulator_abi(void) {
    return 3;
}

/* Let calls be found and do something. Refused beside an NVIDIA device: the library stays inert there. */
EXPORTED int vmem_emulator_activate(void) {
    if (in_forked_child()) {
        return FORKED;
    }
    (void)pthread_mutex_lock(&state.lock);
    state.active = !state.real_device;
    (void)pthread_mutex_unlock(&state.lock);
    return state.active ? 0 : BAD_VALUE;
}

/* A control's hold on the lock; a forked child has none. */
static bool lock(void) {
    return !in_forked_child() && pthread_mutex_lock(&state.lock) == 0;
}

static int unlock(int answer) {
    (void)pthread_mutex_unlock(&state.lock);
    return answer;
}

/* Look for an NVIDIA device under another root; where there is one, every call fails until the next reset. */
EXPORTED int vmem_emulator_look_for_devices(const char *root) {
    bool found = looks_like_real_device(root);
    if (lock()) {
        state.planted_device = found;
        (void)unlock(0);
    }
    return found;
}

/* The calls' names and rules' names and texts, one after the other; NULL behind the last. */
EXPORTED const char *vmem_emulator_call_name(size_t i) {
    return i < N_CALLS ? call_name((enum Call)i) : NULL;
}

EXPORTED const char *vmem_emulator_rule(size_t i) {
    static const char *const rules[N_RULES] = {
#define X(name, result, text) #name ": " text,
        RULES(X)
#undef X
    };
    return i < N_RULES ? rules[i] : NULL;
}

static struct Plan *plan_of(const char *name) {
    for (int i = 0; i < N_CALLS; i++) {
        if (strcmp(name, call_name((enum Call)i)) == 0) {
            return &state.plans[i];
        }
    }
    return NULL;
}

/* Fail the nth call of a name from now on (1 is the next one), and where `on` all behind it; where `all`, every call of
 * any name behind it. nth 0 plans nothing. */
EXPORTED int vmem_emulator_fail(const char *name, uint64_t nth, int code, int on, int all) {
    struct Plan *plan = plan_of(name);
    if (plan == NULL) {
        return UNKNOWN_NAME;
    }
    if (!lock()) {
        return FORKED;
    }
    plan->fail_at = nth == 0 ? 0 : plan->n_calls + nth;
    plan->fail_on = on != 0;
    plan->fail_all = all != 0;
    plan->code = (CUresult)code;
    return unlock(0);
}

EXPORTED int vmem_emulator_slow(const char *name, uint64_t delay_us) {
    struct Plan *plan = plan_of(name);
    if (plan == NULL) {
        return UNKNOWN_NAME;
    }
    if (!lock()) {
        return FORKED;
    }
    plan->delay_us = delay_us;
    return unlock(0);
}

static uint64_t count(enum Count what) {
    uint64_t n = 0;
    switch (what) {
    case HANDLES:
        return state.memory.n_live;
    case MAPPINGS:
        return memory_n_mappings();
    case RESERVATIONS:
        return memory_n_reservations();
    case STREAMS:
        return state.streams.n_live;
    case EVENTS:
        return state.events.n_live;
    case CONTEXTS:
        for (int i = 0; i < MAX_DEVICES; i++) {
            n += state.devices[i].n_retained;
        }
        return n;
    case PINNED:
        return pinned_count();
    case VIOLATIONS:
        return state.n_violations;
    case UNFINISHED:
        return streams_busy();
    }
    return n;
}

static bool something_lives(void) {
    for (int what = HANDLES; what <= PINNED; what++) {
        if (count((enum Count)what) > 0) {
            return true;
        }
    }
    return streams_busy();
}

static int set(enum Setting setting, uint64_t value) {
    switch (setting) {
    case MEMORY_BYTES:
        state.memory_bytes = value;
        return 0;
    case MAX_LIVE_MAPPINGS:
        state.max_mappings = value;
        return 0;
    case GRANULARITY:
        if (value < (uint64_t)sysconf(_SC_PAGESIZE) || (value & (value - 1)) != 0) {
            return BAD_VALUE;
        }
        if (something_lives()) {
            return SOMETHING_LIVES;
        }
        state.granularity_bytes = value;
        return 0;
    case N_DEVICES:
        if (value > MAX_DEVICES) {
            return BAD_VALUE;
        }
        if (something_lives()) {
            return SOMETHING_LIVES;
        }
        state.n_devices = (int)value;
        return 0;
    case VIRTUAL_MEMORY:
        state.virtual_memory = value != 0;
        return 0;
    case ZERO_NEW_PAGES:
        state.zero_new_pages = value != 0;
        return 0;
    case PINNED_BYTES:
        state.max_pinned_bytes = value;
        return 0;
    case STICKY:
        state.sticky = (CUresult)value;
        (void)pthread_cond_broadcast(&state.changed); /* nobody waits for work that will never be done */
        return 0;
    }
    return BAD_VALUE;
}

EXPORTED int vmem_emulator_set(int setting, uint64_t value) {
    return lock() ? unlock(set((enum Setting)setting, value)) : FORKED;
}

EXPORTED uint64_t vmem_emulator_count(int what) {
    if (!lock()) {
        return 0;
    }
    uint64_t n = count((enum Count)what);
    (void)unlock(0);
    return n;
}

EXPORTED uint64_t vmem_emulator_n_calls(size_t i) {
    if (i >= N_CALLS || !lock()) {
        return 0;
    }
    uint64_t n = state.plans[i].n_calls;
    (void)unlock(0);
    return n;
}

/* Copy the text of a violation; the list is cut off behind MAX_VIOLATIONS, the count is not. */
EXPORTED int vmem_emulator_violation(uint64_t i, char *text, size_t n_chars) {
    if (!lock()) {
        return FORKED;
    }
    if (i >= state.n_violations || i >= MAX_VIOLATIONS) {
        return unlock(BAD_VALUE);
    }
    (void)snprintf(text, n_chars, "%s", state.violations[i]);
    return unlock(0);
}

EXPORTED int vmem_emulator_forget_violations(void) {
    if (!lock()) {
        return FORKED;
    }
    state.n_violations = 0;
    return unlock(0);
}

static struct Stream *any_stream(uint64_t id, int device) {
    if (id <= STREAM_LEGACY) {
        return device >= 0 && device < state.n_devices ? stream_of(id, device) : NULL;
    }
    struct Stream *stream = state.all_streams; /* destroyed ones with unfinished work included */
    while (stream != NULL && stream->id != id) {
        stream = stream->next;
    }
    return stream;
}

/* Keep a stream's work from running, or let it go. Stream 0 is the default stream of `device`. */
EXPORTED int vmem_emulator_hold(uint64_t id, int device, int held) {
    if (!lock()) {
        return FORKED;
    }
    struct Stream *stream = any_stream(id, device);
    if (stream == NULL) {
        return unlock(BAD_VALUE);
    }
    stream->held = held != 0;
    streams_pump();
    return unlock(0);
}

/* Let a stream begin or end to capture. What is queued meanwhile goes into a graph that nobody launches. */
EXPORTED int vmem_emulator_capture(uint64_t id, int device, int on) {
    if (!lock()) {
        return FORKED;
    }
    struct Stream *stream = any_stream(id, device);
    if (stream == NULL) {
        return unlock(BAD_VALUE);
    }
    stream->capturing = on != 0;
    return unlock(0);
}

/* Queue work that stands for a kernel which reads and writes a range. */
EXPORTED int vmem_emulator_use(uint64_t id, int device, uint64_t address, uint64_t n_bytes) {
    if (!lock()) {
        return FORKED;
    }
    struct Stream *stream = any_stream(id, device);
    if (stream == NULL || !memory_is_accessible(stream->device, address, n_bytes, MEM_ACCESS_READWRITE)) {
        return unlock(BAD_VALUE);
    }
    stream_queue_use(stream, address, n_bytes);
    return unlock(0);
}

/* The ids of live streams, one after the other; 0 behind the last. */
EXPORTED uint64_t vmem_emulator_stream(size_t i) {
    uint64_t id = 0;
    if (!lock()) {
        return 0;
    }
    for (uint32_t slot = 0; slot < state.streams.n_slots; slot++) {
        const struct Stream *stream = table_at(&state.streams, slot);
        if (stream != NULL && i-- == 0) {
            id = stream->id;
            break;
        }
    }
    (void)unlock(0);
    return id;
}

/* Back to the beginning, cuInit included. Whatever lives is freed where `force`; whoever waits gets an error. */
EXPORTED int vmem_emulator_reset(int force) {
    if (!lock()) {
        return FORKED;
    }
    if (!force && something_lives()) {
        return unlock(SOMETHING_LIVES);
    }
    state.epoch++;
    streams_reset();
    memory_reset();
    pinned_reset();
    for (int i = 0; i < MAX_DEVICES; i++) {
        state.devices[i].n_retained = 0;
    }
    state_init();
    (void)pthread_cond_broadcast(&state.changed);
    return unlock(0);
}
