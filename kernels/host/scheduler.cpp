// Runs a kernel's blocks one after another, the threads of a block as fibers. Between barriers
// the threads (and the blocks) run in a chosen order: what depends on it is a missing barrier or
// a race between blocks. Barriers are checked: all threads must come to the same one.
//
// The blocks of a cooperative launch are all there from the start: a block runs until it waits for
// another one, then the next block does. Where nobody gets on any more, that is an error.
#include "cuda_host.h"

#include <sys/mman.h>

#include <cstdio>
#include <memory>
#include <vector>

__thread HostIndex threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved.
asm(R"(
.text
.globl fpenet_fiber_switch
.type fpenet_fiber_switch, @function
fpenet_fiber_switch:
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
.size fpenet_fiber_switch, . - fpenet_fiber_switch
)");
extern "C" void fpenet_fiber_switch(void** from, void* to);

namespace fpenet_host {
namespace {

constexpr size_t STACK = 64 * 1024, PAGE = 4096;
constexpr size_t CANARY = 256;
constexpr unsigned char POISON = 0xff;  // NaN as float and as half
constexpr unsigned char CANARY_BYTE = 0xa5;

enum State : uint8_t { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, WAITING, DONE };

// How far a block has come.
enum Outcome : uint8_t { FINISHED, STUCK, FAILED };

struct Fiber {
    void* stack = nullptr;
    void* pointer = nullptr;
    State state = DONE;
    int line = 0;
    unsigned mask = 0;
    unsigned exchanges = 0;
    unsigned gathered = 0;  // of lane 0: the last exchange that a first lane has worked on
    uint64_t slots[2] = {0, 0};
    HostIndex index = {0, 0, 0};
};

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
};

enum Order { FORWARD, REVERSE, SHUFFLED };

void arrange(std::vector<unsigned>& order, size_t count, int how, Random& random) {
    order.resize(count);
    for (size_t i = 0; i < count; ++i) {
        order[i] = static_cast<unsigned>(how == REVERSE ? count - 1 - i : i);
    }
    if (how != SHUFFLED) return;
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random.next() % i]);
}

// A block of the launch: its fibers, and its shared memory between canaries.
struct Block {
    HostIndex index;
    size_t first;
    size_t running;
    std::vector<unsigned char> memory;
    unsigned char* shared;
};

// The fibers of one OS thread.
struct Machine {
    std::vector<Fiber> fibers;
    void* scheduler = nullptr;
    Fiber* current = nullptr;
    const KernelEntry* kernel = nullptr;
    void* const* args = nullptr;
    const char* problem = nullptr;
    unsigned char* dynamic = nullptr;
    // Whether any thread did more than look again for what it waits for.
    bool progress = false;

    ~Machine() {
        for (Fiber& fiber : fibers) munmap(fiber.stack, STACK);
    }

    bool reserve(size_t count);
    void rewind(Fiber& fiber);
    void start(Block& block, size_t threads, size_t shared_bytes);
    Outcome run(Block& block, size_t threads, int order, Random& random, char* message, size_t len);
    Outcome release(const Block& block, size_t threads, char* message, size_t len);
};

thread_local Machine machine;

void fiber_main() {
    for (;;) {
        machine.kernel->invoke(machine.args);
        machine.current->state = DONE;
        fpenet_fiber_switch(&machine.current->pointer, machine.scheduler);
    }
}

void yield() { fpenet_fiber_switch(&machine.current->pointer, machine.scheduler); }

bool Machine::reserve(size_t count) {
    while (fibers.size() < count) {
        Fiber fiber;
        fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fiber.stack == MAP_FAILED) return false;
        mprotect(fiber.stack, PAGE, PROT_NONE);  // a stack overflow stops there
        rewind(fiber);
        fibers.push_back(fiber);
    }
    return true;
}

// Lets the fiber start at fiber_main when it is next switched to.
void Machine::rewind(Fiber& fiber) {
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + STACK);
    top[-1] = nullptr;  // where a return address would be; keeps the stack aligned as calls do
    top[-2] = reinterpret_cast<void*>(&fiber_main);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    fiber.pointer = top - 8;
    fiber.state = DONE;
}

// Opens the barriers at which everybody has arrived. STUCK if a thread waits for another block, FAILED,
// with a message, if nobody can go on.
Outcome Machine::release(const Block& block, size_t threads, char* message, size_t len) {
    Fiber* const fibers = this->fibers.data() + block.first;
    bool released = false;
    for (size_t base = 0; base < threads; base += 32) {
        const size_t lanes = threads - base < 32 ? threads - base : 32;
        for (size_t lane = 0; lane < lanes; ++lane) {
            if (fibers[base + lane].state != AT_WARP_BARRIER) continue;
            const unsigned mask = fibers[base + lane].mask;
            bool complete = true;
            for (size_t other = 0; other < lanes; ++other) {
                const Fiber& fiber = fibers[base + other];
                if (!(mask >> other & 1)) continue;
                complete &= fiber.state == AT_WARP_BARRIER && fiber.mask == mask &&
                            fiber.line == fibers[base + lane].line;
            }
            if (!complete) continue;
            for (size_t other = 0; other < lanes; ++other) {
                if (mask >> other & 1) fibers[base + other].state = READY;
            }
            released = true;
        }
    }
    if (released) return FINISHED;
    for (size_t i = 0; i < threads; ++i) {
        if (fibers[i].state == WAITING) return STUCK;
    }
    const int line = fibers[0].line;
    for (size_t i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == AT_BLOCK_BARRIER && fiber.line == line) continue;
        const char* states[] = {"running", "at a block barrier", "at a warp barrier", "waiting",
                                "finished"};
        snprintf(message, len,
                 "barrier not reached by all: thread 0 is %s (line %d), thread %zu is %s (line %d) "
                 "in block %u, %u, %u",
                 states[fibers[0].state], line, i, states[fiber.state], fiber.line, blockIdx.x,
                 blockIdx.y, blockIdx.z);
        return FAILED;
    }
    for (size_t i = 0; i < threads; ++i) fibers[i].state = READY;
    return FINISHED;
}

// Puts a block's threads at the kernel's beginning, with fresh shared memory.
void Machine::start(Block& block, size_t threads, size_t shared_bytes) {
    block.running = threads;
    block.memory.assign(shared_bytes + 2 * CANARY, CANARY_BYTE);
    block.shared = block.memory.data() + CANARY;
    block.shared += -reinterpret_cast<uintptr_t>(block.shared) & 127;
    std::memset(block.shared, POISON, shared_bytes);
    Fiber* fiber = fibers.data() + block.first;
    for (unsigned z = 0; z < blockDim.z; ++z) {
        for (unsigned y = 0; y < blockDim.y; ++y) {
            for (unsigned x = 0; x < blockDim.x; ++x, ++fiber) {
                fiber->index = {x, y, z};
                fiber->state = READY;
                fiber->line = 0;
                fiber->exchanges = 0;
                fiber->gathered = 0;
            }
        }
    }
}

// Runs a block to its end, or until it waits for another one.
Outcome Machine::run(Block& block, size_t threads, int how, Random& random, char* message,
                     size_t len) {
    static thread_local std::vector<unsigned> order;
    Fiber* const own = fibers.data() + block.first;
    blockIdx = block.index;
    dynamic = block.shared;
    bool again = true;  // threads that wait look again, once
    for (;;) {
        arrange(order, threads, how, random);
        for (unsigned thread : order) {
            Fiber& fiber = own[thread];
            const bool waited = fiber.state == WAITING;
            if (fiber.state != READY && !(waited && again)) continue;
            current = &fiber;
            threadIdx = fiber.index;
            fpenet_fiber_switch(&scheduler, fiber.pointer);
            if (problem != nullptr) {
                snprintf(message, len, "%s (line %d, thread %u, block %u, %u, %u)", problem,
                         fiber.line, thread, blockIdx.x, blockIdx.y, blockIdx.z);
                problem = nullptr;
                return FAILED;
            }
            if (!(waited && fiber.state == WAITING)) progress = true;
            if (fiber.state == DONE) --block.running;
        }
        again = false;
        if (block.running == 0) return FINISHED;
        const Outcome outcome = release(block, threads, message, len);
        if (outcome != FINISHED) return outcome;
    }
}

}  // namespace

void* dynamic_shared() { return machine.dynamic; }

int lane() { return static_cast<int>((machine.current - machine.fibers.data()) & 31); }

void block_barrier(int line) {
    machine.current->state = AT_BLOCK_BARRIER;
    machine.current->line = line;
    yield();
}

void warp_barrier(unsigned mask, int line) {
    machine.current->state = AT_WARP_BARRIER;
    machine.current->line = line;
    machine.current->mask = mask;
    yield();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int line) {
    Fiber* me = machine.current;
    // Two slots in turn: a fast lane's next value must not hide this one from a slow lane.
    const unsigned slot = me->exchanges++ & 1;
    me->slots[slot] = value;
    warp_barrier(mask, line);
    const size_t base = static_cast<size_t>(me - machine.fibers.data()) & ~size_t{31};
    return machine.fibers[base + static_cast<size_t>(source & 31)].slots[slot];
}

bool gather(uint64_t value, uint64_t (&all)[32], int line) {
    Fiber* me = machine.current;
    const unsigned slot = me->exchanges & 1;
    exchange(0xffffffffu, value, 0, line);
    Fiber* warp = &machine.fibers[static_cast<size_t>(me - machine.fibers.data()) & ~size_t{31}];
    for (int i = 0; i < 32; ++i) all[i] = warp[i].slots[slot];
    return std::exchange(warp->gathered, me->exchanges) != me->exchanges;
}

void wait_for_others(int line) {
    machine.current->state = WAITING;
    machine.current->line = line;
    yield();
}

void fail(const char* problem, int line) {
    machine.problem = problem;
    machine.current->line = line;
    yield();
}

}  // namespace fpenet_host

using namespace fpenet_host;

// Runs every block of a launch, one after another or, in a cooperative launch, side by side. Order 0
// forward, 1 reverse, 2 shuffled by `seed`. Returns 0, or 1 with a message.
extern "C" int fpenet_host_launch(const KernelEntry* kernel, const unsigned* grid,
                                  const unsigned* block, size_t shared_bytes, int cooperative,
                                  void* const* args, int order, uint64_t seed, char* message,
                                  size_t len) {
    const size_t threads = static_cast<size_t>(block[0]) * block[1] * block[2];
    const size_t count = static_cast<size_t>(grid[0]) * grid[1] * grid[2];
    const size_t together = cooperative ? count : 1;
    Machine& m = machine;
    if (!m.reserve(threads * together)) {
        snprintf(message, len, "no memory for the stacks of %zu threads", threads * together);
        return 1;
    }
    m.kernel = kernel;
    m.args = args;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    Random random{seed};
    std::vector<unsigned> all, turns;
    arrange(all, count, order, random);
    std::vector<Block> blocks(together);
    // Where a launch ends early, the threads' stacks hold half a kernel each.
    const auto give_up = [&m] {
        for (Fiber& fiber : m.fibers) m.rewind(fiber);
        return 1;
    };
    for (size_t begin = 0; begin < count; begin += together) {
        for (size_t i = 0; i < together; ++i) {
            const unsigned index = all[begin + i];
            blocks[i].index = {index % grid[0], index / grid[0] % grid[1],
                               index / grid[0] / grid[1]};
            blocks[i].first = i * threads;
            m.start(blocks[i], threads, shared_bytes);
        }
        size_t left = together;
        while (left > 0) {
            m.progress = false;
            arrange(turns, together, order == REVERSE ? FORWARD : order, random);
            for (unsigned turn : turns) {
                Block& now = blocks[turn];
                if (now.running == 0) continue;
                const Outcome outcome = m.run(now, threads, order, random, message, len);
                if (outcome == FAILED) return give_up();
                if (outcome == STUCK) continue;
                --left;
                const unsigned char* end = now.memory.data() + now.memory.size();
                for (const unsigned char* p = now.shared + shared_bytes; p < end; ++p) {
                    if (*p == CANARY_BYTE) continue;
                    snprintf(message, len,
                             "wrote past its %zu bytes of shared memory (block %u, %u, %u)",
                             shared_bytes, blockIdx.x, blockIdx.y, blockIdx.z);
                    return give_up();
                }
            }
            if (m.progress) continue;
            // Everybody has looked again, and found nothing new.
            for (const Block& now : blocks) {
                const Fiber* fiber = m.fibers.data() + now.first;
                for (size_t i = 0; i < threads; ++i, ++fiber) {
                    if (now.running == 0 || fiber->state != WAITING) continue;
                    snprintf(message, len,
                             "grid barrier not reached by all: block %u, %u, %u waits (line %d), "
                             "%zu of %zu blocks that run side by side are finished",
                             now.index.x, now.index.y, now.index.z, fiber->line, together - left,
                             together);
                    return give_up();
                }
            }
        }
    }
    return 0;
}
