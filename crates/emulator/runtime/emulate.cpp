// Runs the CTAs of one launch on one OS thread: every CUDA thread is a fiber, and a schedule picks
// the fiber that runs next.
//
// Checked on the way: all threads reach the same barrier, a warp operation is joined by all lanes
// of its mask with the same mask at the same line, no thread exits past a barrier that others wait
// at, no access leaves its buffer (the driver puts inaccessible pages around each). A violation
// ends the launch with a sentence, not with a hang or a crash.
// A build that reports its accesses is also held to have a barrier between any two threads that
// touch the same shared memory.
// Not modelled: reordering of plain loads and stores between fibers (they run whole stretches),
// bank conflicts, occupancy.
//
// Each kernel's library holds a copy of this file, and the driver loads a library once per OS
// thread: nothing here is shared. One more copy without a kernel serves the process: it maps
// buffers and installs the handler of faults, which must outlive any kernel.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

#include "emulate.h"

#ifndef __x86_64__
#error "the fiber switch is written for x86-64; add one for this machine (six callee-saved registers and the stack pointer)"
#endif

extern "C" {
Dim3 threadIdx, blockIdx, blockDim, gridDim;
}

// Saves the callee-saved registers on the running stack, stores its pointer, and continues on
// another stack. A ucontext switch costs two system calls more and ten times the time.
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

// Where a launch continues after a fault, and what the fault was.
struct FaultExit {
    sigjmp_buf place;
    const void* address;
};

extern char __start_redraft_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_redraft_shared[] __attribute__((weak, visibility("hidden")));

namespace {

enum class Wait { None, Barrier, Warp, Exited };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    void* stack_pointer;
    Wait wait;
    int site;
    std::vector<Copy> copies;     // started and not done
    std::vector<unsigned> groups;  // ends of the closed groups among them
};

// Lanes of a warp that meet, by the lowest lane of their mask.
struct Meeting {
    unsigned mask, arrived;
    int site;
    EmulatedLane lanes[32];
};

enum Schedule { Forward, Reverse, Random, WarpGreedy };
enum Copies { Late, Eager };

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t PAGE = 4096;
constexpr size_t GAP = 1 << 20;  // between buffers: addresses cost nothing, and an index may be wrong by a whole row
constexpr unsigned NAN_PATTERN = 0x7fc0dead;

std::vector<Fiber> fibers;
std::vector<Meeting> meetings;  // 32 for each warp
char* stacks;
size_t stacks_bytes;
char* dynamic_map;  // the dynamic shared memory ends at an inaccessible page
size_t dynamic_mapped;
char* dynamic_shared;
unsigned count, running, at_barrier, barrier_flags, barrier_result;
int barrier_site, schedule, copy_timing;
unsigned long long random_state;
void* main_stack;
const char* kernel_name;
void (*entry)(const void*);
const void* parameters;
char failure[512];

void describe(const char* format, va_list values) {
    if (failure[0]) return;
    const int used = snprintf(failure, sizeof failure, "%s, CTA (%u, %u, %u), thread %u: ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, running);
    vsnprintf(failure + used, sizeof failure - used, format, values);
}

void note(const char* format, ...) {
    va_list values;
    va_start(values, format);
    describe(format, values);
    va_end(values);
}

unsigned random_below(unsigned bound) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((random_state >> 33) % bound);
}

// The next fiber to run, or `count` if none can.
unsigned pick() {
    const unsigned last = running;
    unsigned i = schedule == Random ? random_below(count) : schedule == WarpGreedy ? last / 32 * 32 : last;
    if (schedule == Forward) i = i + 1 == count ? 0 : i + 1;
    if (schedule == Reverse) i = i == 0 ? count - 1 : i - 1;
    for (unsigned step = 0; step < count; ++step) {
        if (fibers[i].wait == Wait::None) return i;
        if (schedule == Reverse) i = i == 0 ? count - 1 : i - 1;
        else i = i + 1 == count ? 0 : i + 1;
    }
    return count;
}

void yield() {
    const unsigned self = running;
    const unsigned next = failure[0] ? count : pick();
    if (next == self) return;
    if (next == count) {
        redraft_switch(&fibers[self].stack_pointer, main_stack);
        return;
    }
    running = next;
    threadIdx.x = next;
    redraft_switch(&fibers[self].stack_pointer, fibers[next].stack_pointer);
}

void run_thread() {
    entry(parameters);
    fibers[running].wait = Wait::Exited;
    yield();
    abort();  // an exited fiber is never resumed
}

// ---- races ----
//
// Two threads touch a byte of shared memory, one of them writes, and no barrier lies between: the
// result depends on timing, whether or not a schedule shows it. A build with -fsanitize=thread
// calls the functions at the end of this file at every access; here is remembered which threads
// wrote and read each byte since the last barrier. Within a warp __syncwarp orders, too; shuffles
// and votes do not.
//
// Of global memory one thing is watched: an atomic on it tells other CTAs that this one's results
// are there. So no thread may write there without a barrier before or after the one that arrives,
// and each write is followed by a fence: of the thread itself, or, after a barrier, of any other.
// (Whether the CTA that comes last has a fence before it reads is not.)

enum class Access { Read, Write, Atomic };
enum Spread : unsigned char { OneThread, OneWarp, SeveralWarps };

// Which threads touched a byte in this epoch, as far as it is not ordered before everything that
// its warp will do.
struct Trace {
    unsigned epoch, round;
    unsigned short thread;
    Spread spread;
    bool atomic;
};

struct Cell {
    Trace written, read;
};

bool watching;  // this library reports its accesses
std::vector<Cell> cells;  // one for each byte, static ones first
unsigned epoch;  // counts barriers, over all CTAs
std::vector<unsigned> warp_rounds;  // counts __syncwarp
Trace stored, arrived;  // the last plain writes to global memory, and the last atomics on it
std::vector<unsigned> unfenced;  // for each thread the epoch of its last write to global memory, 0 once a fence followed

bool unordered(const Trace& trace) {
    if (trace.epoch != epoch || (trace.spread == OneThread && trace.thread == running)) return false;
    return trace.spread == SeveralWarps || trace.thread / 32 != running / 32 || trace.round == warp_rounds[running / 32];
}

void add(Trace& trace, bool atomic) {
    const unsigned round = warp_rounds[running / 32];
    const bool is_new = trace.epoch != epoch || (trace.spread != SeveralWarps && trace.thread / 32 == running / 32 && trace.round != round);
    if (is_new) trace = {epoch, round, (unsigned short)running, OneThread, atomic};
    else if (trace.thread / 32 != running / 32) trace.spread = SeveralWarps;
    else if (trace.spread == OneThread && trace.thread != running) trace.spread = OneWarp;
    trace.atomic &= atomic;
}

void accessed_global(const void* address, Access access) {
    if (access == Access::Read || ((const char*)address >= stacks && (const char*)address < stacks + stacks_bytes)) return;
    if (access == Access::Write) {
        if (unordered(arrived)) {
            emulate_fail("race: writes global memory, and thread %u has an atomic there for others to see, with no barrier between", arrived.thread);
        }
        add(stored, false);
        unfenced[running] = epoch;
        return;
    }
    if (unordered(stored)) emulate_fail("race: an atomic on global memory, where thread %u wrote, with no barrier between", stored.thread);
    for (unsigned i = 0; i < count; ++i) {
        if (unfenced[i]) emulate_fail("race: an atomic on global memory, where thread %u wrote, with no fence between", i);
    }
    add(arrived, true);
}

void fenced() {
    for (unsigned i = 0; i < count; ++i) {
        if (i == running || unfenced[i] < epoch) unfenced[i] = 0;
    }
}

void accessed(const void* address, size_t bytes, Access access) {
    const size_t statics = __stop_redraft_shared - __start_redraft_shared;
    const size_t in_static = (const char*)address - __start_redraft_shared, in_dynamic = (const char*)address - dynamic_shared;
    const bool is_static = in_static < statics;
    const size_t first = is_static ? in_static : statics + in_dynamic;
    if (first >= cells.size()) return accessed_global(address, access);
    for (size_t i = first; i < first + bytes && i < cells.size(); ++i) {
        Cell& cell = cells[i];
        const bool after_write = unordered(cell.written) && !(access == Access::Atomic && cell.written.atomic);
        if (after_write || (access != Access::Read && unordered(cell.read))) {
            const Trace& other = after_write ? cell.written : cell.read;
            emulate_fail("race: %s byte %zu of the %s shared memory, which thread %u%s %s, with no barrier between (the last stands at line %d)",
                         access == Access::Read ? "reads" : "writes", is_static ? in_static : in_dynamic, is_static ? "static" : "dynamic",
                         other.thread, other.spread == OneThread ? "" : " and others", after_write ? "wrote" : "read", barrier_site);
        }
        if (access == Access::Read) {
            add(cell.read, false);
        } else {
            if (access == Access::Write) cell.written.epoch = 0;
            add(cell.written, access == Access::Atomic);
        }
    }
}

void finish(const Copy& copy) {
    if (watching) accessed(copy.to, 16, Access::Write);
    if (copy.valid) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}

void run_cta() {
    for (char* word = __start_redraft_shared; word && word + 4 <= __stop_redraft_shared; word += 4) memcpy(word, &NAN_PATTERN, 4);
    for (char* word = dynamic_shared; word && word < dynamic_map + dynamic_mapped - PAGE; word += 4) memcpy(word, &NAN_PATTERN, 4);
    at_barrier = barrier_flags = 0;
    barrier_site = 0;
    ++epoch;
    for (unsigned& write : unfenced) write = 0;
    for (Meeting& meeting : meetings) meeting.arrived = 0;
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.wait = Wait::None;
        fiber.copies.clear();
        fiber.groups.clear();
        // Six registers, the address that `ret` takes, and one word so that the entry sees the
        // alignment of a call.
        void** top = (void**)(stacks + (i + 1) * STACK_BYTES) - 8;
        memset(top, 0, 8 * sizeof(void*));
        top[6] = (void*)run_thread;
        fiber.stack_pointer = top;
    }
    running = schedule == Forward ? count - 1 : 0;
    const unsigned first = pick();
    running = first;
    threadIdx = {first, 0, 0};
    redraft_switch(&main_stack, fibers[first].stack_pointer);

    unsigned exited = 0;
    for (const Fiber& fiber : fibers) exited += fiber.wait == Wait::Exited;
    for (unsigned i = 0; i < count && exited < count && !failure[0]; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.wait == Wait::Exited) continue;
        snprintf(failure, sizeof failure, "%s, CTA (%u, %u, %u), thread %u: waits for ever at the %s of line %d; %u of %u threads have exited",
                 kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, i, fiber.wait == Wait::Barrier ? "barrier" : "warp operation", fiber.site,
                 exited, count);
    }
}

void* map(size_t bytes) {
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return address == MAP_FAILED ? nullptr : address;
}

bool reserve(unsigned block, size_t shared_bytes) {
    if (stacks_bytes < block * STACK_BYTES) {
        if (stacks) munmap(stacks, stacks_bytes);
        stacks_bytes = block * STACK_BYTES;
        stacks = (char*)map(stacks_bytes);
    }
    const size_t rounded = (shared_bytes + 127) / 128 * 128;
    const size_t mapped = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    if (dynamic_mapped != mapped) {
        if (dynamic_map) munmap(dynamic_map, dynamic_mapped);
        dynamic_mapped = mapped;
        dynamic_map = (char*)map(mapped);
        if (dynamic_map) mprotect(dynamic_map + mapped - PAGE, PAGE, PROT_NONE);
    }
    if (!stacks || !dynamic_map) return false;
    dynamic_shared = dynamic_map + mapped - PAGE - rounded;
    if (watching) cells.assign(__stop_redraft_shared - __start_redraft_shared + rounded, Cell{});
    fibers.resize(block);
    meetings.resize(block);  // 32 for each 32 threads
    warp_rounds.assign(block / 32, 0);
    unfenced.assign(block, 0);
    count = block;
    return true;
}

thread_local FaultExit* fault_exit;  // of the launch on this OS thread
struct sigaction previous_handler;

void on_fault(int signal, siginfo_t* info, void* context) {
    if (FaultExit* exit = fault_exit) {
        exit->address = info->si_addr;
        siglongjmp(exit->place, 1);
    }
    // Somebody else's fault.
    if (previous_handler.sa_flags & SA_SIGINFO) {
        previous_handler.sa_sigaction(signal, info, context);
    } else if (previous_handler.sa_handler != SIG_DFL && previous_handler.sa_handler != SIG_IGN) {
        previous_handler.sa_handler(signal);
    } else {
        sigaction(signal, &previous_handler, nullptr);  // the access is tried again, and ends the process as it would have
    }
}

// What a library holds goes with it.
__attribute__((destructor)) void release() {
    if (stacks) munmap(stacks, stacks_bytes);
    if (dynamic_map) munmap(dynamic_map, dynamic_mapped);
}

}  // namespace

void emulate_fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    describe(format, values);
    va_end(values);
    yield();
    abort();  // nothing runs after a failure
}

unsigned char* emulate_dynamic_shared() { return (unsigned char*)dynamic_shared; }

unsigned emulate_barrier(bool flag, int site) {
    if (at_barrier == 0) barrier_site = site;
    if (barrier_site != site) emulate_fail("one barrier joined from line %d and line %d", barrier_site, site);
    Fiber& self = fibers[running];
    self.wait = Wait::Barrier;
    self.site = site;
    barrier_flags += flag;
    if (++at_barrier == count) {
        barrier_result = barrier_flags;
        at_barrier = barrier_flags = 0;
        ++epoch;
        for (Fiber& fiber : fibers) fiber.wait = Wait::None;
    }
    yield();
    // The next result needs this thread at the next barrier.
    return barrier_result;
}

void emulate_warp(unsigned mask, EmulatedLane lane, void (*work)(unsigned, EmulatedLane*), int site) {
    const unsigned self = running, own = self & 31u, warp = self & ~31u;
    if (!(mask >> own & 1u)) emulate_fail("not in its own mask %08x, line %d", mask, site);
    Meeting& meeting = meetings[warp + __builtin_ctz(mask)];
    if (meeting.arrived == 0) {
        meeting.mask = mask;
        meeting.site = site;
    } else if (meeting.mask != mask || meeting.site != site) {
        emulate_fail("lanes meet with different masks or from lines %d and %d", meeting.site, site);
    }
    meeting.lanes[own] = lane;
    meeting.arrived |= 1u << own;
    if (meeting.arrived == mask) {
        if (work) work(mask, meeting.lanes);
        else if (mask == 0xffffffffu) ++warp_rounds[warp / 32];
        meeting.arrived = 0;
        for (unsigned i = 0; i < 32; ++i) {
            if (mask >> i & 1u) fibers[warp + i].wait = Wait::None;
        }
        // In these two orders another thread may go first.
        if (schedule == Reverse || schedule == Random) yield();
        return;
    }
    fibers[self].wait = Wait::Warp;
    fibers[self].site = site;
    yield();
}

// ---- tensor cores: the arithmetic of src/cuda/tensor_core.rs, which names its sources ----

namespace {

// How the emulated architecture adds: `products` of an element at a time, each term cut
// `fraction_bits` below the largest exponent.
struct TensorCore {
    int products, fraction_bits;
} tensor_core;

constexpr int NO_EXPONENT = -100000;  // of zero: below any sum of two others

// Exponents as the format has them, -126 for subnormal numbers.
int exponent_of(float value) {
    const unsigned bits = __float_as_uint(value) & 0x7fffffffu;
    const int exponent = (int)(bits >> 23);
    return bits == 0 ? NO_EXPONENT : (exponent == 0 ? 1 : exponent) - 127;
}

double power_of_two(int exponent) { return __longlong_as_double((long long)(exponent + 1023) << 52); }

// The f32 next to `value` toward zero. From 2^128 on that is infinity, as the hardware has it.
float toward_zero(double value) {
    const float near = (float)value;
    if (__builtin_fabs(value) >= 0x1p128 || __builtin_fabs((double)near) <= __builtin_fabs(value)) return near;
    return __uint_as_float(__float_as_uint(near) - 1);
}

// One element whose sum is not finite, by the rules of IEEE 754 with one NaN.
float not_finite(float sum, const float* a, const float (*b)[8], unsigned column) {
    double plain = sum;
    for (unsigned k = 0; k < 16; ++k) plain += (double)a[k] * (double)b[k][column];
    return plain != plain ? __uint_as_float(0x7fffffffu) : (float)plain;
}

}  // namespace

void emulate_mma_work(unsigned, EmulatedLane* lanes) {
    float a[16][16], b[16][8], d[16][8];
    const auto wide = [](unsigned bits) { return __uint_as_float(bits << 16); };
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned g = lane / 4, t = lane % 4 * 2;
        const unsigned* pa = (const unsigned*)lanes[lane].in[0];
        const unsigned* pb = (const unsigned*)lanes[lane].in[1];
        const float* pd = (const float*)lanes[lane].out;
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = g + i % 2 * 8, column = t + i / 2 * 8;
            a[row][column] = wide(pa[i]);
            a[row][column + 1] = wide(pa[i] >> 16);
        }
        for (unsigned i = 0; i < 2; ++i) {
            b[t + i * 8][g] = wide(pb[i]);
            b[t + i * 8 + 1][g] = wide(pb[i] >> 16);
        }
        d[g][t] = pd[0];
        d[g][t + 1] = pd[1];
        d[g + 8][t] = pd[2];
        d[g + 8][t + 1] = pd[3];
    }
    int b_exponent[16][8];
    for (unsigned k = 0; k < 16; ++k) {
        for (unsigned column = 0; column < 8; ++column) b_exponent[k][column] = exponent_of(b[k][column]);
    }
    for (unsigned row = 0; row < 16; ++row) {
        int a_exponent[16];
        for (unsigned k = 0; k < 16; ++k) a_exponent[k] = exponent_of(a[row][k]);
        float before[8];
        memcpy(before, d[row], sizeof before);
        for (int first = 0; first < 16; first += tensor_core.products) {
            const int end = first + tensor_core.products;
            int largest[8];
            double scale[8], total[8];
            for (unsigned column = 0; column < 8; ++column) largest[column] = exponent_of(d[row][column]);
            for (int k = first; k < end; ++k) {
                for (unsigned column = 0; column < 8; ++column) {
                    const int exponent = a_exponent[k] + b_exponent[k][column];
                    largest[column] = largest[column] < exponent ? exponent : largest[column];
                }
            }
            // A sum of nothing but zeros takes any scale.
            for (unsigned column = 0; column < 8; ++column) {
                if (largest[column] < -400) largest[column] = 0;
                scale[column] = power_of_two(tensor_core.fraction_bits - largest[column]);
                total[column] = __builtin_trunc(d[row][column] * scale[column]);
            }
            // Products are exact in f64, and so are sums of whole numbers below 2^32.
            for (int k = first; k < end; ++k) {
                const double x = a[row][k];
                for (unsigned column = 0; column < 8; ++column) total[column] += __builtin_trunc(x * b[k][column] * scale[column]);
            }
            for (unsigned column = 0; column < 8; ++column) {
                // From -0 as well: a sum that is zero is +0.
                d[row][column] = toward_zero(total[column] * power_of_two(largest[column] - tensor_core.fraction_bits) + 0.0);
            }
        }
        for (unsigned column = 0; column < 8; ++column) {
            // An operand that is not finite has the exponent 128, and makes a sum of nothing that
            // means anything.
            bool finite = exponent_of(before[column]) < 128;
            for (unsigned k = 0; k < 16; ++k) finite &= a_exponent[k] < 128 && b_exponent[k][column] < 128;
            if (!finite) d[row][column] = not_finite(before[column], a[row], b, column);
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned g = lane / 4, t = lane % 4 * 2;
        float* pd = (float*)lanes[lane].out;
        pd[0] = d[g][t];
        pd[1] = d[g][t + 1];
        pd[2] = d[g + 8][t];
        pd[3] = d[g + 8][t + 1];
    }
}

void emulate_cp_async(void* shared, const void* global, bool valid, int site) {
    if (((size_t)shared | (size_t)global) % 16 != 0) emulate_fail("cp.async of line %d is not aligned to 16 bytes", site);
    const Copy copy = {shared, global, valid};
    if (copy_timing == Eager) {
        finish(copy);
    } else {
        if (watching) accessed(shared, 16, Access::Write);  // it may happen now as well as at the wait
        fibers[running].copies.push_back(copy);
    }
}

void emulate_cp_async_commit() {
    Fiber& self = fibers[running];
    self.groups.push_back((unsigned)self.copies.size());
}

void emulate_cp_async_wait(int pending) {
    Fiber& self = fibers[running];
    if ((int)self.groups.size() <= pending) return;
    const size_t closed = self.groups.size() - pending;
    const unsigned end = self.groups[closed - 1];
    for (unsigned i = 0; i < end; ++i) finish(self.copies[i]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + end);
    self.groups.erase(self.groups.begin(), self.groups.begin() + closed);
    for (unsigned& group : self.groups) group -= end;
}

// ---- what a build with -fsanitize=thread calls ----

extern "C" {

void __tsan_init() { watching = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {
    fenced();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void __tsan_read_range(void* address, size_t bytes) { accessed(address, bytes, Access::Read); }
void __tsan_write_range(void* address, size_t bytes) { accessed(address, bytes, Access::Write); }

#define ACCESSES(bytes) \
    void __tsan_read##bytes(void* address) { accessed(address, bytes, Access::Read); } \
    void __tsan_write##bytes(void* address) { accessed(address, bytes, Access::Write); } \
    void __tsan_unaligned_read##bytes(void* address) { accessed(address, bytes, Access::Read); } \
    void __tsan_unaligned_write##bytes(void* address) { accessed(address, bytes, Access::Write); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)

#define ATOMIC(bits, Word, name, builtin) \
    Word __tsan_atomic##bits##_##name(volatile Word* target, Word value, int) { \
        accessed((const void*)target, sizeof(Word), Access::Atomic); \
        return builtin(target, value, __ATOMIC_SEQ_CST); \
    }
#define ATOMICS(bits, Word) \
    ATOMIC(bits, Word, fetch_add, __atomic_fetch_add) \
    ATOMIC(bits, Word, fetch_sub, __atomic_fetch_sub) \
    ATOMIC(bits, Word, fetch_or, __atomic_fetch_or) \
    ATOMIC(bits, Word, fetch_and, __atomic_fetch_and) \
    ATOMIC(bits, Word, exchange, __atomic_exchange_n) \
    Word __tsan_atomic##bits##_load(const volatile Word* target, int) { \
        accessed((const void*)target, sizeof(Word), Access::Atomic); \
        return __atomic_load_n(target, __ATOMIC_SEQ_CST); \
    } \
    bool __tsan_atomic##bits##_compare_exchange_strong(volatile Word* target, Word* expected, Word value, int, int) { \
        accessed((const void*)target, sizeof(Word), Access::Atomic); \
        return __atomic_compare_exchange_n(target, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }
ATOMICS(32, unsigned) ATOMICS(64, unsigned long long)

// Runs the CTAs first, first + stride, ... of a launch; null, or what went wrong. `timing`: Copies.
// `catch_faults`: of the process's copy.
// `products` and `fraction_bits`: see TensorCore.
const char* redraft_launch(const char* name, void (*kernel)(const void*), const void* params, const unsigned* grid, unsigned block,
                           unsigned shared_bytes, int order, int timing, int products, int fraction_bits, unsigned first, unsigned stride,
                           void (*catch_faults)(void*)) {
    tensor_core = {products, fraction_bits};
    kernel_name = name;
    entry = kernel;
    parameters = params;
    schedule = order;
    copy_timing = timing;
    failure[0] = 0;
    if (!reserve(block, shared_bytes)) return "the host has no memory for the fibers of a CTA";
    // Faults are handled on a stack of their own: the one that faulted may be the reason.
    static char alternate[32 << 10];
    stack_t signal_stack = {}, old_stack = {};
    signal_stack.ss_sp = alternate;
    signal_stack.ss_size = sizeof alternate;
    sigaltstack(&signal_stack, &old_stack);
    blockDim = {block, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    const unsigned long long ctas = (unsigned long long)grid[0] * grid[1] * grid[2];
    static FaultExit fault;
    if (sigsetjmp(fault.place, 1) == 0) {
        catch_faults(&fault);
        for (unsigned long long cta = first; cta < ctas && !failure[0]; cta += stride) {
            blockIdx = {(unsigned)(cta % grid[0]), (unsigned)(cta / grid[0] % grid[1]), (unsigned)(cta / grid[0] / grid[1])};
            random_state = 0x9E3779B97F4A7C15ull ^ cta;
            run_cta();
        }
    } else {
        note("access outside of any buffer, at %p", fault.address);
    }
    catch_faults(nullptr);
    sigaltstack(&old_stack, nullptr);
    return failure[0] ? failure : nullptr;
}

// Pages for a buffer between inaccessible ones; null if there are none.
void* redraft_map(size_t bytes) {
    char* address = (char*)mmap(nullptr, bytes + 2 * GAP, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == (char*)MAP_FAILED) return nullptr;
    if (mprotect(address + GAP, bytes, PROT_READ | PROT_WRITE) != 0) {
        munmap(address, bytes + 2 * GAP);
        return nullptr;
    }
    return address + GAP;
}

void redraft_unmap(void* address, size_t bytes) { munmap((char*)address - GAP, bytes + 2 * GAP); }

// From here on a fault on this OS thread continues at `exit`, a FaultExit; null: faults go to the
// handler before again.
void redraft_catch_faults(void* exit) {
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        return sigaction(SIGSEGV, &action, &previous_handler) == 0;
    }();
    fault_exit = installed ? (FaultExit*)exit : nullptr;
}
}
