// A CUDA driver (libcuda.so.1) and cuBLAS played on the CPU, for tests/driver.rs: what the CUDA backend says to
// the driver is checked and carried out where there is no GPU. Kernels are the host build of kernels/*.cu, found
// by the names in the PTX that is loaded.
//
// Only the calls that fpenet makes are here, with the signatures and numbers of the CUDA manual, and none that
// a driver for CUDA 12.0 lacks: cudarc finds out by name. What a real driver would let pass but nobody can mean
// (a copy from memory that is not pinned, arguments of another size than the kernel's parameters) ends the
// program with "stand-in driver: ...".
//
// FPENET_DRIVER_ORDER  late (default): work in a stream is done when somebody waits for it, and not before;
//                      early: at once; a number: sooner or later, by this seed. Results must not differ.
// FPENET_DRIVER_GPU    compute capability times 10 (default 75)
// FPENET_DRIVER_NAME   the GPU's name (default says that it is none); one with a data sheet is chosen for by it
// FPENET_DRIVER_CUDA   version that cuDriverGetVersion tells (default 13000)
// FPENET_DRIVER_MEMORY bytes of device memory (default 4 GiB)
// FPENET_DRIVER_FAULT  a kernel that ends in an illegal address
// FPENET_DRIVER_COMPILES  milliseconds that a module takes to be compiled (default 0)
// FPENET_DRIVER_REFUSES   the start of names of kernels that cannot be compiled
// FPENET_DRIVER_WORKS  0: launches and products are checked, but not carried out (for sizes that would take hours)
// FPENET_DRIVER_LOG    a file that gets a line per call of interest
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

using CUdeviceptr = unsigned long long;

enum CUresult : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_ISOLATION = 905,
};

// Seen by cublas.cpp, which is a library of its own.
namespace driver __attribute__((visibility("default"))) {

// A point in a stream's work.
struct Moment {
    struct Stream* stream = nullptr;
    bool over = false;
    bool captured = false;
    double seconds = 0;
};

// A piece of work in a stream: something to do, then something to record; before both, something to wait for.
struct Op {
    std::function<void()> work;
    std::shared_ptr<Moment> waits, records;
    // Pinned memory that the work reads or writes.
    const void* host = nullptr;
};

struct Graph {
    std::vector<Op> ops;
};

// Everything there is, behind one lock.
struct State {
    std::recursive_mutex lock;
    bool initialized = false;
    // What a kernel has done to the context: every later call says so.
    CUresult sticky = SUCCESS;
};
State& state();

// What the environment asks for.
const char* setting(const char* name, const char* otherwise);
long number(const char* name, long otherwise);
int capability();
int cuda_version();
bool works();
int shared_limit();
constexpr int MULTIPROCESSORS = 3, BLOCKS_PER_MULTIPROCESSOR = 2;

// Ends the program: nobody can have meant this.
[[noreturn]] __attribute__((format(printf, 1, 2))) void misuse(const char* format, ...);
__attribute__((format(printf, 1, 2))) void note(const char* format, ...);

// The lock, and whether a call is possible at all: initialised, a context current, no earlier fault.
struct Call {
    std::lock_guard<std::recursive_mutex> guard;
    CUresult status;
    Call();
    explicit operator bool() const { return status == SUCCESS; }
};

// Puts work into a stream, or into the graph that is being captured there.
CUresult enqueue(void* stream, Op op);
bool capturing(void* stream);
// For calls that are not allowed while this thread captures: they break the capture.
CUresult outside_capture();
// Does all work of all streams.
void drain();
// Whether work that is not done yet uses this pinned memory.
bool pending(const void* host);

// Checks that device memory holds `bytes` from `address` on.
bool on_device(CUdeviceptr address, size_t bytes);

}  // namespace driver
