// PTX modules, their kernels and launches. The kernels that run are those of the host build, but what a launch
// must keep to (size of each parameter, threads per block, static shared memory) is read from the PTX.
#include "driver.h"
#include "host/cuda_host.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <thread>

extern "C" const fpenet_host::KernelEntry* fpenet_host_kernel(const char* name);
extern "C" int fpenet_host_launch(const fpenet_host::KernelEntry*, const unsigned* grid, const unsigned* block,
                                  size_t shared_bytes, int cooperative, void* const* args, int order, uint64_t seed,
                                  char* message, size_t length);

namespace driver {
namespace {

// Without opting in.
constexpr int DYNAMIC_SHARED = 48 * 1024;
// Largest block of a kernel without __launch_bounds__: what tools/kernel-report.sh counts registers for.
constexpr unsigned UNBOUNDED_THREADS = 256;

struct Function {
    std::string name;
    const fpenet_host::KernelEntry* host;
    std::vector<size_t> parameters;
    unsigned most_threads;
    int static_shared;
    int dynamic_limit;
};

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};

std::set<void*> modules, functions;

// The number behind a word, or -1.
int after(const std::string& text, const char* word) {
    const size_t at = text.find(word);
    return at == std::string::npos ? -1 : std::atoi(text.c_str() + at + std::strlen(word));
}

// Bytes of a declaration as in ".param .u64 .ptr .align 1 x" or ".param .align 8 .b8 x[48]": type times length.
size_t declared_bytes(const std::string& line) {
    static const std::map<std::string, size_t> types = {
        {".u8", 1}, {".b8", 1}, {".u16", 2}, {".b16", 2}, {".u32", 4}, {".s32", 4},
        {".b32", 4}, {".f32", 4}, {".u64", 8}, {".s64", 8}, {".b64", 8}, {".f64", 8},
    };
    for (const auto& [type, size] : types) {
        if (line.find(type + " ") == std::string::npos) continue;
        const size_t bracket = line.find('[');
        return size * (bracket == std::string::npos ? 1 : std::strtoul(line.c_str() + bracket + 1, nullptr, 10));
    }
    misuse("PTX declaration of an unknown type: %s", line.c_str());
}

// A kernel from the text that follows ".entry ".
std::unique_ptr<Function> parse(const std::string& text) {
    auto function = std::make_unique<Function>();
    function->name = text.substr(0, text.find_first_of("( \n"));
    const size_t body = text.find('{');
    const std::string head = text.substr(0, body);
    for (size_t at = head.find(".param "); at != std::string::npos; at = head.find(".param ", at + 1)) {
        function->parameters.push_back(declared_bytes(head.substr(at, head.find('\n', at) - at)));
    }
    const int bound = after(head, ".maxntid ");
    function->most_threads = bound > 0 ? static_cast<unsigned>(bound) : UNBOUNDED_THREADS;
    function->static_shared = 0;
    const size_t end = text.find("\n}", body);
    for (size_t at = text.find("\t.shared ", body); at < end; at = text.find("\t.shared ", at + 1)) {
        function->static_shared += static_cast<int>(declared_bytes(text.substr(at, text.find('\n', at) - at)));
    }
    function->dynamic_limit = DYNAMIC_SHARED - function->static_shared;
    function->host = fpenet_host_kernel(function->name.c_str());
    if (function->host == nullptr) misuse("kernel %s is not in the host build", function->name.c_str());
    const size_t* sizes = function->host->sizes;
    for (size_t size : function->parameters) {
        if (*sizes++ != size) misuse("kernel %s has other parameters in the host build", function->name.c_str());
    }
    if (*sizes != 0) misuse("kernel %s has more parameters in the host build", function->name.c_str());
    return function;
}

Function* function_of(void* handle) {
    return functions.count(handle) != 0 ? static_cast<Function*>(handle) : nullptr;
}

struct Shape {
    std::array<unsigned, 3> grid, block;
    unsigned shared;
};

CUresult launch(void* handle, Shape shape, void* stream, void** parameters, bool cooperative) {
    Call call;
    if (!call) return call.status;
    Function* function = function_of(handle);
    if (function == nullptr) return INVALID_HANDLE;
    const auto [grid, block, shared] = shape;
    const unsigned long long threads = 1ull * block[0] * block[1] * block[2];
    const unsigned long long blocks = 1ull * grid[0] * grid[1] * grid[2];
    const bool sound = threads >= 1 && threads <= 1024 && block[2] <= 64 && blocks >= 1 && grid[0] <= 0x7fffffff &&
                       grid[1] <= 65535 && grid[2] <= 65535;
    if (!sound) return INVALID_VALUE;
    // Beyond its launch bounds, a kernel may need more registers than there are.
    if (threads > function->most_threads) return LAUNCH_OUT_OF_RESOURCES;
    if (static_cast<int>(shared) > function->dynamic_limit) return INVALID_VALUE;
    if (cooperative && blocks > MULTIPROCESSORS * BLOCKS_PER_MULTIPROCESSOR) return COOPERATIVE_LAUNCH_TOO_LARGE;

    // The arguments as they are now: the caller's memory may go.
    std::vector<std::vector<unsigned char>> values;
    for (size_t i = 0; i < function->parameters.size(); ++i) {
        if (parameters[i] == nullptr) misuse("argument %zu of %s is missing", i, function->name.c_str());
        const auto* bytes = static_cast<const unsigned char*>(parameters[i]);
        values.emplace_back(bytes, bytes + function->parameters[i]);
    }
    const auto work = [=]() mutable {
        if (function->name == setting("FPENET_DRIVER_FAULT", "")) {
            state().sticky = ILLEGAL_ADDRESS;
            return;
        }
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        if (!works()) return;
        char message[512] = "";
        const int failed = fpenet_host_launch(function->host, grid.data(), block.data(), shared, cooperative,
                                              pointers.data(), 0, 0, message, sizeof message);
        if (failed != 0) {
            std::fprintf(stderr, "stand-in driver: %s: %s\n", function->name.c_str(), message);
            state().sticky = LAUNCH_FAILED;
        }
    };
    return enqueue(stream, Op{work, {}, {}});
}

}  // namespace
}  // namespace driver

using namespace driver;

API CUresult cuModuleLoadDataEx(void** handle, const void* image, unsigned options, int* kinds, void** values) {
    // Compiling is done beside other calls, as a real driver does it.
    static std::atomic<int> compiling = 0;
    const int at_once = ++compiling;
    std::this_thread::sleep_for(std::chrono::milliseconds(number("FPENET_DRIVER_COMPILES", 0)));
    --compiling;
    Call call;
    if (!call) return call.status;
    if (CUresult status = outside_capture()) return status;
    const std::string text = static_cast<const char*>(image);
    const auto count = [&text](char c) { return std::count(text.begin(), text.end(), c); };
    if (count('{') != count('}')) misuse("a module is cut off in the middle");
    if (text.find(std::string(".entry ") + setting("FPENET_DRIVER_REFUSES", "?")) != std::string::npos) {
        // An error log and its length, and nothing else, is asked for.
        if (options != 2 || kinds[0] != 5 || kinds[1] != 6) misuse("options of a module that nobody knows");
        std::snprintf(static_cast<char*>(values[0]), reinterpret_cast<size_t>(values[1]), "ptxas fatal: refused");
        return INVALID_PTX;
    }
    // The release of PTX that came with CUDA 13.0 is 9.0, with 12.9 it was 8.8; before that 8.0 was 12.0's.
    const int major = after(text, ".version "), minor = after(text, (".version " + std::to_string(major) + ".").c_str());
    const int cuda = cuda_version();
    const int newest = cuda >= 13000 ? 90 + (cuda - 13000) / 10 : cuda >= 12090 ? 88 : 80 + (cuda - 12000) / 10;
    if (10 * major + minor > newest) return UNSUPPORTED_PTX_VERSION;
    if (after(text, ".target sm_") > capability()) return NO_BINARY_FOR_GPU;
    auto module = std::make_unique<Module>();
    for (size_t at = text.find(".entry "); at != std::string::npos; at = text.find(".entry ", at + 1)) {
        std::unique_ptr<Function> function = parse(text.substr(at + std::strlen(".entry ")));
        functions.insert(function.get());
        note("module of %s, %d at once", function->name.c_str(), at_once);
        module->functions[function->name] = std::move(function);
    }
    *handle = *modules.insert(module.release()).first;
    return SUCCESS;
}

API CUresult cuModuleUnload(void* handle) {
    Call call;
    if (modules.erase(handle) == 0) return INVALID_HANDLE;
    drain();
    auto* module = static_cast<Module*>(handle);
    for (const auto& [name, function] : module->functions) functions.erase(function.get());
    delete module;
    return call.status;
}

API CUresult cuModuleGetFunction(void** function, void* handle, const char* name) {
    Call call;
    if (!call) return call.status;
    if (modules.count(handle) == 0) return INVALID_HANDLE;
    const auto& all = static_cast<Module*>(handle)->functions;
    const auto found = all.find(name);
    if (found == all.end()) return NOT_FOUND;
    *function = found->second.get();
    return SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, int attribute, void* handle) {
    Call call;
    Function* function = function_of(handle);
    if (function == nullptr) return INVALID_HANDLE;
    if (attribute != 1) misuse("function attribute %d is not in its table", attribute);
    *value = function->static_shared;
    return call.status;
}

API CUresult cuFuncSetAttribute(void* handle, int attribute, int value) {
    Call call;
    Function* function = function_of(handle);
    if (function == nullptr) return INVALID_HANDLE;
    if (attribute != 8) misuse("function attribute %d is not in its table", attribute);
    if (value < 0 || value + function->static_shared > shared_limit()) return INVALID_VALUE;
    function->dynamic_limit = value;
    return call.status;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int, size_t) {
    Call call;
    *blocks = BLOCKS_PER_MULTIPROCESSOR;
    return function_of(handle) != nullptr ? call.status : INVALID_HANDLE;
}

API CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
    if (extra != nullptr) misuse("arguments are handed over in a buffer");
    return launch(function, Shape{{gx, gy, gz}, {bx, by, bz}, shared}, stream, parameters, false);
}

API CUresult cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters) {
    return launch(function, Shape{{gx, gy, gz}, {bx, by, bz}, shared}, stream, parameters, true);
}

struct CUlaunchAttribute {
    int id;
    char pad[4];
    union {
        int value;
        char room[64];
    };
};

struct CUlaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    CUlaunchAttribute* attributes;
    unsigned count;
};

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** parameters, void** extra) {
    const CUlaunchConfig& c = *config;
    // Programmatic stream serialization, which Hopper brought.
    const bool known = c.count == 1 && c.attributes->id == 6 && c.attributes->value == 1 && extra == nullptr;
    if (!known || capability() < 90) misuse("a launch attribute that this GPU does not have");
    note("dependent launch");
    const Shape shape{{c.grid[0], c.grid[1], c.grid[2]}, {c.block[0], c.block[1], c.block[2]}, c.shared};
    return launch(function, shape, c.stream, parameters, false);
}
