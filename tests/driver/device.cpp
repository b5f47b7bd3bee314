// Initialisation, the one device, its context, errors in words.
#include "driver.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

namespace driver {

State& state() {
    static State* state = new State;  // never destroyed: the last call may come from a destructor
    return *state;
}

const char* setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value != nullptr && *value != 0 ? value : otherwise;
}

long number(const char* name, long otherwise) {
    const char* value = setting(name, nullptr);
    return value != nullptr ? std::atol(value) : otherwise;
}

int capability() { return static_cast<int>(number("FPENET_DRIVER_GPU", 75)); }

bool works() { return number("FPENET_DRIVER_WORKS", 1) != 0; }
int cuda_version() { return static_cast<int>(number("FPENET_DRIVER_CUDA", 13000)); }

// The manual's table of opt-in limits.
int shared_limit() {
    static const std::map<int, int> limits = {
        {70, 98304}, {75, 65536}, {80, 166912}, {86, 101376}, {89, 101376}, {90, 232448}, {120, 101376}};
    const auto found = limits.find(capability());
    if (found == limits.end()) misuse("FPENET_DRIVER_GPU=%d is not in its table", capability());
    return found->second;
}

static void write_line(FILE* file, const char* start, const char* format, va_list arguments) {
    std::fputs(start, file);
    std::vfprintf(file, format, arguments);
    std::fputc('\n', file);
    std::fflush(file);
}

void misuse(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_line(stderr, "stand-in driver: ", format, arguments);
    va_end(arguments);
    std::_Exit(99);
}

void note(const char* format, ...) {
    static FILE* const file = [] {
        const char* path = setting("FPENET_DRIVER_LOG", nullptr);
        return path != nullptr ? std::fopen(path, "a") : nullptr;
    }();
    if (file == nullptr) return;
    va_list arguments;
    va_start(arguments, format);
    write_line(file, "", format, arguments);
    va_end(arguments);
}

static thread_local void* current = nullptr;
static int context;  // its address is the handle

Call::Call() : guard(state().lock) {
    status = !state().initialized ? NOT_INITIALIZED : current == nullptr ? INVALID_CONTEXT : state().sticky;
}

}  // namespace driver

using namespace driver;

API CUresult cuInit(unsigned flags) {
    state().initialized = true;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

API CUresult cuDriverGetVersion(int* version) {
    *version = cuda_version();
    return SUCCESS;
}

API CUresult cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return !state().initialized ? NOT_INITIALIZED : ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

API CUresult cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, static_cast<size_t>(length), "%s", setting("FPENET_DRIVER_NAME", "stand-in driver, no GPU"));
    return SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = static_cast<size_t>(number("FPENET_DRIVER_MEMORY", 4l << 30));
    return SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = MULTIPROCESSORS; break;
        case 75: *value = capability() / 10; break;
        case 76: *value = capability() % 10; break;
        case 97: *value = shared_limit(); break;
        case 115: *value = 1; break;  // memory pools
        default: misuse("device attribute %d is not in its table", attribute);
    }
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(void** handle, int) {
    *handle = &context;
    return state().initialized ? SUCCESS : NOT_INITIALIZED;
}

API CUresult cuDevicePrimaryCtxRelease_v2(int) {
    drain();
    return SUCCESS;
}

API CUresult cuCtxGetCurrent(void** handle) {
    *handle = current;
    return SUCCESS;
}

API CUresult cuCtxSetCurrent(void* handle) {
    if (handle != nullptr && handle != &context) return INVALID_CONTEXT;
    current = handle;
    return SUCCESS;
}

static const std::map<int, std::pair<const char*, const char*>> WORDS = {
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
};

API CUresult cuGetErrorString(int error, const char** text) {
    const auto found = WORDS.find(error);
    *text = found != WORDS.end() ? found->second.second : "see the manual";
    return SUCCESS;
}

API CUresult cuGetErrorName(int error, const char** text) {
    const auto found = WORDS.find(error);
    *text = found != WORDS.end() ? found->second.first : "CUDA_ERROR";
    return SUCCESS;
}
