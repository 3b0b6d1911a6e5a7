/* The state of the emulated driver, the record of broken rules, and the tables of live ids. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "emulator.h"

struct State state = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static const struct {
    const char *name;
    enum Needs needs;
} calls[N_CALLS] = {
#define X(name, needs) {#name, needs},
    CALLS(X)
#undef X
};

static const struct {
    const char *name;
    CUresult result;
} rules[N_RULES] = {
#define X(name, result, text) {#name, CUDA_##result},
    RULES(X)
#undef X
};

const char *call_name(enum Call call) {
    return calls[call].name;
}

enum Needs call_needs(enum Call call) {
    return calls[call].needs;
}

void state_init(void) {
    state.planted_device = false;
    state.initialized = false;
    memset(state.plans, 0, sizeof state.plans);
    state.n_devices = 1;
    state.memory_bytes = UINT64_C(2) << 30;
    state.max_mappings = 30000; /* each may cost the process two of the 65,530 that Linux allows it */
    state.granularity_bytes = UINT64_C(2) << 20;
    state.max_pinned_bytes = UINT64_MAX;
    state.virtual_memory = true;
    state.zero_new_pages = false;
    state.sticky = CUDA_SUCCESS;
    state.memory.kind = KIND_MEMORY;
    state.streams.kind = KIND_STREAM;
    state.events.kind = KIND_EVENT;
    state.n_violations = 0;
}

bool looks_like_real_device(const char *root) {
    static const char *const signs[] = {
        "dev/nvidiactl",  "dev/nvidia0", "proc/driver/nvidia", /* discrete cards */
        "dev/dxg",                                             /* Windows' devices under WSL2 */
        "dev/nvhost-gpu", "dev/nvgpu",                         /* Jetson */
    };
    for (size_t i = 0; i < sizeof signs / sizeof *signs; i++) {
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", root, signs[i]) < (int)sizeof path && access(path, F_OK) == 0) {
            return true;
        }
    }
    return false;
}

CUresult broken(enum Rule rule, const char *format, ...) {
    if (state.n_violations < MAX_VIOLATIONS) {
        char *text = state.violations[state.n_violations];
        int n = snprintf(text, VIOLATION_CHARS, "%s: %s: ", rules[rule].name, calls[state.call].name);
        va_list arguments;
        va_start(arguments, format);
        (void)vsnprintf(text + n, VIOLATION_CHARS - (size_t)n, format, arguments);
        va_end(arguments);
    }
    state.n_violations++;
    return rules[rule].result;
}

void *allocated(size_t n_bytes) {
    void *memory = calloc(1, n_bytes);
    if (memory == NULL) {
        (void)fputs("the CUDA emulator is out of memory for its own books\n", stderr);
        abort();
    }
    return memory;
}

struct Slot {
    void *object; /* NULL while the slot is free */
    uint32_t generation;
    uint32_t next_free; /* as Table.first_free */
};

/* An id is generation, slot number + 1, kind. */
enum { KIND_BITS = 4, SLOT_BITS = 24 };

static uint64_t id_of(const struct Table *table, uint32_t slot) {
    uint64_t generation = table->slots[slot].generation;
    return ((generation << SLOT_BITS | (slot + 1)) << KIND_BITS) | table->kind;
}

static struct Slot *slot_of(const struct Table *table, uint64_t id) {
    uint64_t number = (id >> KIND_BITS) & ((UINT64_C(1) << SLOT_BITS) - 1);
    if (number == 0 || number > table->n_slots || id_of(table, (uint32_t)number - 1) != id) {
        return NULL;
    }
    return &table->slots[number - 1];
}

uint64_t table_add(struct Table *table, void *object) {
    if (table->first_free == 0) {
        uint32_t n = table->n_slots == 0 ? 64 : 2 * table->n_slots;
        struct Slot *slots = allocated(n * sizeof *slots);
        if (table->n_slots > 0) {
            memcpy(slots, table->slots, table->n_slots * sizeof *slots);
        }
        for (uint32_t i = n; i > table->n_slots; i--) {
            slots[i - 1].next_free = table->first_free;
            table->first_free = i;
        }
        free(table->slots);
        table->slots = slots;
        table->n_slots = n;
    }
    uint32_t slot = table->first_free - 1;
    table->first_free = table->slots[slot].next_free;
    table->slots[slot].object = object;
    table->slots[slot].generation++;
    table->n_live++;
    return id_of(table, slot);
}

void *table_get(const struct Table *table, uint64_t id) {
    const struct Slot *slot = slot_of(table, id);
    return slot == NULL ? NULL : slot->object;
}

void table_remove(struct Table *table, uint64_t id) {
    struct Slot *slot = slot_of(table, id);
    slot->object = NULL;
    slot->next_free = table->first_free;
    table->first_free = (uint32_t)(slot - table->slots) + 1;
    table->n_live--;
}

void *table_at(const struct Table *table, uint32_t slot) {
    return slot < table->n_slots ? table->slots[slot].object : NULL;
}
