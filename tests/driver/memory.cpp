// Device memory (host memory between guard pages, poisoned with NaN), pinned memory, copies.
#include "driver.h"

#include <sys/mman.h>

#include <cstring>
#include <map>

namespace driver {
namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256;
constexpr unsigned char POISON = 0xff;  // NaN as float and as half

struct Memory {
    void* mapping;
    size_t mapped, bytes;
};

std::map<CUdeviceptr, Memory> memory;
std::map<const unsigned char*, size_t> pinned;
size_t used = 0;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

size_t total() { return static_cast<size_t>(number("FPENET_DRIVER_MEMORY", 4l << 30)); }

bool is_pinned(const void* address, size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(address);
    auto after = pinned.upper_bound(first);
    if (after == pinned.begin()) return false;
    const auto& [start, length] = *--after;
    return first + bytes <= start + length;
}

// The pinned memory that an address lies in.
const void* pinned_start(const void* address) {
    return std::prev(pinned.upper_bound(static_cast<const unsigned char*>(address)))->first;
}

}  // namespace

bool on_device(CUdeviceptr address, size_t bytes) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    const auto& [start, block] = *--after;
    return address + bytes <= start + block.bytes;
}

}  // namespace driver

using namespace driver;

API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    Call call;
    if (!call) return call.status;
    if (bytes == 0) return INVALID_VALUE;
    if (CUresult status = outside_capture()) return status;
    const size_t room = round_up(bytes, ALIGNMENT);
    if (used + room > total()) return OUT_OF_MEMORY;
    // The end lies at a guard page: what is written behind it is a fault.
    const size_t mapped = round_up(room, PAGE) + 2 * PAGE;
    void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    auto* inside = static_cast<unsigned char*>(mapping) + PAGE;
    mprotect(inside, mapped - 2 * PAGE, PROT_READ | PROT_WRITE);
    unsigned char* start = inside + (mapped - 2 * PAGE - room);
    if (works()) std::memset(start, POISON, room);
    used += room;
    *address = reinterpret_cast<CUdeviceptr>(start);
    memory[*address] = Memory{mapping, mapped, bytes};
    note("alloc %zu", bytes);
    return SUCCESS;
}

API CUresult cuMemFree_v2(CUdeviceptr address) {
    Call call;
    const auto found = memory.find(address);
    if (found == memory.end()) return INVALID_VALUE;
    if (CUresult status = outside_capture()) return status;
    drain();
    used -= round_up(found->second.bytes, ALIGNMENT);
    munmap(found->second.mapping, found->second.mapped);
    memory.erase(found);
    return call.status;
}

API CUresult cuMemGetInfo_v2(size_t* free, size_t* all) {
    Call call;
    *all = total();
    *free = *all - used;
    return call.status;
}

API CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    Call call;
    if (!call) return call.status;
    if (CUresult status = outside_capture()) return status;
    *address = std::malloc(bytes);
    if (*address == nullptr) return OUT_OF_MEMORY;
    std::memset(*address, POISON, bytes);
    pinned[static_cast<unsigned char*>(*address)] = bytes;
    note("pinned %zu", bytes);
    return SUCCESS;
}

API CUresult cuMemFreeHost(void* address) {
    Call call;
    if (pinned.erase(static_cast<unsigned char*>(address)) == 0) return INVALID_VALUE;
    if (pending(address)) misuse("pinned memory is freed while a copy still uses it");
    std::free(address);
    return call.status;
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream) {
    Call call;
    if (!call) return call.status;
    if (!on_device(to, bytes)) return INVALID_VALUE;
    if (!is_pinned(from, bytes)) misuse("a copy to the device reads memory that is not pinned");
    note("to device %zu", bytes);
    return enqueue(stream, Op{[=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); }, {}, {},
                              pinned_start(from)});
}

API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream) {
    Call call;
    if (!call) return call.status;
    if (!on_device(from, bytes)) return INVALID_VALUE;
    if (!is_pinned(to, bytes)) misuse("a copy from the device writes memory that is not pinned");
    note("to host %zu", bytes);
    return enqueue(stream, Op{[=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); }, {}, {},
                              pinned_start(to)});
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) {
    Call call;
    if (!call) return call.status;
    if (!on_device(to, bytes) || !on_device(from, bytes)) return INVALID_VALUE;
    return enqueue(
        stream,
        Op{[=] { std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes); }, {}, {}});
}

API CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, void* stream) {
    Call call;
    if (!call) return call.status;
    if (!on_device(at, bytes)) return INVALID_VALUE;
    return enqueue(stream, Op{[=] { std::memset(reinterpret_cast<void*>(at), value, bytes); }, {}, {}});
}
