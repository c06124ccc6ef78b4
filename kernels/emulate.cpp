// Runs the CTAs of one launch on one OS thread: every CUDA thread is a fiber, and a schedule picks who runs next.
//
// Checked on the way: all threads reach the same barrier, a warp exchange is joined by all lanes of its mask with the same mask at
// the same line, no thread exits past a barrier that others wait at. A violation ends the launch with a sentence, not with a hang.
// Not modelled: reordering of plain loads and stores between fibers (they run whole stretches), bank conflicts, occupancy.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulate.h"

#ifndef __x86_64__
#error "the fiber switch is written for x86-64; add one for this machine (six callee-saved registers and the stack pointer)"
#endif

Dim3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee-saved registers on the running stack, stores its pointer, and continues on another stack. A ucontext switch
// costs two system calls more and ten times the time.
extern "C" void redraft_switch(void** save, void* load);
asm(R"(
    .text
    .type redraft_switch, @function
redraft_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size redraft_switch, .-redraft_switch
)");

extern char __start_redraft_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_redraft_shared[] __attribute__((weak, visibility("hidden")));

namespace {

enum class Wait { None, Barrier, Exchange, Exited };

struct Fiber {
    void* stack_pointer;
    Wait wait;
    int site;
    unsigned mask, deposit;
    unsigned received[32];
};

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned NAN_PATTERN = 0x7fc0dead;

std::vector<Fiber> fibers;
std::vector<char> stacks;
unsigned running, at_barrier;
void* scheduler_stack;
void (*entry)(const void*);
const void* parameters;
char failure[256];

void fail(const char* format, ...) {
    if (failure[0]) return;
    va_list values;
    va_start(values, format);
    vsnprintf(failure, sizeof failure, format, values);
    va_end(values);
}

void yield() {
    const unsigned self = running;
    redraft_switch(&fibers[self].stack_pointer, scheduler_stack);
}

void run_thread() {
    entry(parameters);
    fibers[running].wait = Wait::Exited;
    yield();
    abort();  // an exited fiber is never resumed
}

unsigned random_below(unsigned long long& state, unsigned bound) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((state >> 33) % bound);
}

enum Schedule { Forward, Reverse, Random, WarpGreedy };

// The next fiber to run, or `count` if none can.
unsigned pick(int schedule, unsigned last, unsigned long long& state) {
    const unsigned count = fibers.size();
    const auto ready = [](unsigned i) { return fibers[i].wait == Wait::None; };
    const unsigned start = schedule == Random ? random_below(state, count) : schedule == WarpGreedy ? last / 32 * 32 : (last + 1) % count;
    for (unsigned step = 0; step < count; ++step) {
        const unsigned i = schedule == Reverse ? (last + count - 1 - step) % count : (start + step) % count;
        if (ready(i)) return i;
    }
    return count;
}

void run_cta(unsigned block, int schedule, unsigned long long& state) {
    for (char* word = __start_redraft_shared; word && word + 4 <= __stop_redraft_shared; word += 4) memcpy(word, &NAN_PATTERN, 4);
    at_barrier = 0;
    for (unsigned i = 0; i < block; ++i) {
        fibers[i] = Fiber{};
        // Six registers, the address that `ret` takes, and one word so that the entry sees the alignment of a call.
        void** top = (void**)(((size_t)stacks.data() + (i + 1) * STACK_BYTES) & ~(size_t)15) - 8;
        memset(top, 0, 8 * sizeof(void*));
        top[6] = (void*)run_thread;
        fibers[i].stack_pointer = top;
    }
    unsigned last = schedule == Reverse ? 0 : block - 1;
    if (schedule == WarpGreedy) last = 0;
    while (!failure[0]) {
        const unsigned next = pick(schedule, last, state);
        if (next == block) break;
        last = running = next;
        threadIdx = {next, 0, 0};
        redraft_switch(&scheduler_stack, fibers[next].stack_pointer);
    }
    unsigned exited = 0;
    for (const Fiber& fiber : fibers) exited += fiber.wait == Wait::Exited;
    for (unsigned i = 0; i < block && exited < block; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.wait == Wait::Exited) continue;
        fail("CTA %u: thread %u waits for ever at the %s of line %d; %u of %u threads have exited", blockIdx.x, i,
             fiber.wait == Wait::Barrier ? "barrier" : "warp exchange", fiber.site, exited, block);
    }
}

}  // namespace

void emulate_barrier(int site) {
    Fiber& self = fibers[running];
    self.wait = Wait::Barrier;
    self.site = site;
    if (++at_barrier == fibers.size()) {
        at_barrier = 0;
        for (Fiber& fiber : fibers) {
            if (fiber.site != site) fail("CTA %u: one barrier joined from line %d and line %d", blockIdx.x, site, fiber.site);
            fiber.wait = Wait::None;
        }
    }
    yield();
}

const unsigned* emulate_exchange(unsigned mask, unsigned value, int site) {
    Fiber& self = fibers[running];
    const unsigned warp = running & ~31u;
    self.wait = Wait::Exchange;
    self.site = site;
    self.mask = mask;
    self.deposit = value;
    if (!(mask >> (running & 31u) & 1u)) fail("CTA %u: thread %u is not in its own mask, line %d", blockIdx.x, running, site);
    bool complete = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        if (warp + lane >= fibers.size() || fibers[warp + lane].wait != Wait::Exchange) {
            complete = false;
        } else if (fibers[warp + lane].mask != mask || fibers[warp + lane].site != site) {
            fail("CTA %u, warp %u: lanes exchange with different masks or from lines %d and %d", blockIdx.x, warp / 32, site,
                 fibers[warp + lane].site);
        }
    }
    for (unsigned lane = 0; lane < 32 && complete; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        for (unsigned from = 0; from < 32; ++from) {
            fibers[warp + lane].received[from] = mask >> from & 1u ? fibers[warp + from].deposit : NAN_PATTERN;
        }
        fibers[warp + lane].wait = Wait::None;
    }
    yield();
    return self.received;
}

// Runs `grid` CTAs of `block` threads; null, or what went wrong. One launch at a time.
extern "C" const char* redraft_launch(void (*kernel)(const void*), const void* params, unsigned grid, unsigned block, int schedule) {
    entry = kernel;
    parameters = params;
    failure[0] = 0;
    fibers.resize(block);
    if (stacks.size() < block * STACK_BYTES) stacks.resize(block * STACK_BYTES);
    blockDim = {block, 1, 1};
    gridDim = {grid, 1, 1};
    unsigned long long state = 0x9E3779B97F4A7C15ull;
    for (unsigned cta = 0; cta < grid && !failure[0]; ++cta) {
        blockIdx = {cta, 0, 0};
        run_cta(block, schedule, state);
    }
    return failure[0] ? failure : nullptr;
}
