// Mistakes that the stand-in driver must find, one per run: `mistakes NAME`. Without it the tests of
// tests/driver.rs would show nothing.
#include "driver.h"

#include <cstdio>
#include <cstring>

API CUresult cuInit(unsigned);
API CUresult cuDevicePrimaryCtxRetain(void**, int);
API CUresult cuCtxSetCurrent(void*);
API CUresult cuStreamCreate(void**, unsigned);
API CUresult cuStreamSynchronize(void*);
API CUresult cuStreamBeginCapture_v2(void*, int);
API CUresult cuStreamEndCapture(void*, void**);
API CUresult cuStreamWaitEvent(void*, void*, unsigned);
API CUresult cuEventCreate(void**, unsigned);
API CUresult cuEventRecord(void*, void*);
API CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
API CUresult cuMemHostAlloc(void**, size_t, unsigned);
API CUresult cuMemFreeHost(void*);
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, void*);
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, void*);
API CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, void*);

namespace {

constexpr size_t BYTES = 64;

int must(CUresult status) {
    if (status != SUCCESS) std::printf("unexpected status %d\n", status);
    return status;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string name = count > 1 ? arguments[1] : "";
    void *context = nullptr, *main = nullptr, *other = nullptr, *event = nullptr;
    cuInit(0);
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxSetCurrent(context);
    cuStreamCreate(&main, 1);
    cuStreamCreate(&other, 1);
    cuEventCreate(&event, 2);
    CUdeviceptr sent = 0, kept = 0;
    cuMemAlloc_v2(&sent, BYTES);
    cuMemAlloc_v2(&kept, BYTES);
    void *from = nullptr, *to = nullptr;
    cuMemHostAlloc(&from, BYTES, 0);
    cuMemHostAlloc(&to, BYTES, 0);
    std::memset(from, 1, BYTES);
    const auto outcome = [&] {
        must(cuMemcpyDtoHAsync_v2(to, kept, BYTES, main));
        must(cuStreamSynchronize(main));
        std::printf("found %d\n", *static_cast<unsigned char*>(to));
        return 0;
    };

    if (name == "nothing" || name == "no event between streams") {
        // Sent on one stream, put in its place on the other.
        must(cuMemcpyHtoDAsync_v2(sent, from, BYTES, other));
        must(cuEventRecord(event, other));
        if (name == "nothing") must(cuStreamWaitEvent(main, event, 0));
        must(cuMemcpyDtoDAsync_v2(kept, sent, BYTES, main));
        return outcome();
    }
    if (name == "host memory used again too early") {
        must(cuMemcpyHtoDAsync_v2(kept, from, BYTES, main));
        std::memset(from, 2, BYTES);
        return outcome();
    }
    if (name == "pinned memory freed too early") {
        must(cuMemcpyHtoDAsync_v2(kept, from, BYTES, main));
        return must(cuMemFreeHost(from));
    }
    if (name == "memory that is not pinned") {
        unsigned char local[BYTES] = {};
        return must(cuMemcpyHtoDAsync_v2(kept, local, BYTES, main));
    }
    if (name == "copy beyond the end") {
        return must(cuMemcpyDtoDAsync_v2(kept, sent + 1, BYTES, main));
    }
    if (name == "memory reserved while captured") {
        void* graph = nullptr;
        must(cuStreamBeginCapture_v2(main, 1));
        must(cuMemAlloc_v2(&kept, BYTES));
        return must(cuStreamEndCapture(main, &graph));
    }
    if (name == "event of another stream while captured") {
        must(cuEventRecord(event, other));
        must(cuStreamBeginCapture_v2(main, 1));
        return must(cuStreamWaitEvent(main, event, 0));
    }
    std::printf("no such mistake: %s\n", name.c_str());
    return 1;
}
