// Streams, events and graphs: work is done in a stream's order, and an event makes one stream wait for another.
#include "driver.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <random>
#include <set>

namespace driver {

struct Stream {
    std::deque<Op> queue;
    // While work is recorded instead of done.
    std::shared_ptr<Graph> capture;
    bool broken = false;
};

namespace {

struct Event {
    std::shared_ptr<Moment> moment;
    bool timed;
};

struct GraphHandle {
    std::shared_ptr<Graph> graph;
};

std::set<void*> streams, events, graphs;
// The stream in which this thread captures.
thread_local Stream* captures = nullptr;

Stream* stream_of(void* handle) {
    if (handle == nullptr) misuse("the null stream is used: it waits for everything else");
    return streams.count(handle) != 0 ? static_cast<Stream*>(handle) : nullptr;
}

double now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(time).count();
}

void reach(Moment& moment);

void run_next(Stream& stream) {
    if (Moment* waits = stream.queue.front().waits.get()) reach(*waits);
    Op op = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (op.work && state().sticky == SUCCESS) op.work();
    if (op.records) {
        op.records->over = true;
        op.records->seconds = now();
    }
}

// Does the work of a moment's stream up to there.
void reach(Moment& moment) {
    while (!moment.over) {
        if (moment.stream->queue.empty()) misuse("an event is waited for that will never come");
        run_next(*moment.stream);
    }
}

void drain(Stream& stream) {
    while (!stream.queue.empty()) run_next(stream);
}

// How much is done now that something new is there.
void progress(Stream& stream) {
    static const std::string order = setting("FPENET_DRIVER_ORDER", "late");
    static std::mt19937_64 random(static_cast<uint64_t>(std::atol(order.c_str())));
    if (order == "late") return;
    if (order == "early") return drain(stream);
    for (uint64_t steps = random() % 3; steps > 0; --steps) {
        auto chosen = streams.begin();
        std::advance(chosen, static_cast<long>(random() % streams.size()));
        Stream& other = *static_cast<Stream*>(*chosen);
        if (!other.queue.empty()) run_next(other);
    }
}

}  // namespace

void drain() {
    for (void* stream : streams) drain(*static_cast<Stream*>(stream));
}

CUresult enqueue(void* handle, Op op) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (op.records) op.records->stream = stream;
    if (stream->capture) {
        if (op.host != nullptr) misuse("a copy from or to the host is captured: a replay would repeat it");
        if (op.waits && !op.waits->captured) {
            stream->broken = true;
            return STREAM_CAPTURE_ISOLATION;
        }
        if (op.records) op.records->captured = true;
        stream->capture->ops.push_back(std::move(op));
        return SUCCESS;
    }
    if (op.waits && op.waits->captured) return STREAM_CAPTURE_ISOLATION;
    stream->queue.push_back(std::move(op));
    progress(*stream);
    return SUCCESS;
}

bool capturing(void* handle) {
    Stream* stream = stream_of(handle);
    return stream != nullptr && stream->capture != nullptr;
}

CUresult outside_capture() {
    if (captures == nullptr) return SUCCESS;
    captures->broken = true;
    return STREAM_CAPTURE_UNSUPPORTED;
}

bool pending(const void* host) {
    return std::any_of(streams.begin(), streams.end(), [host](void* stream) {
        const auto& queue = static_cast<Stream*>(stream)->queue;
        return std::any_of(queue.begin(), queue.end(), [host](const Op& op) { return op.host == host; });
    });
}

}  // namespace driver

using namespace driver;

API CUresult cuCtxSynchronize() {
    Call call;
    if (!call) return call.status;
    if (CUresult status = outside_capture()) return status;
    drain();
    return state().sticky;
}

API CUresult cuStreamCreate(void** handle, unsigned flags) {
    Call call;
    if (!call) return call.status;
    if (flags != 1) misuse("a stream that waits for the null stream");
    *handle = *streams.insert(new Stream).first;
    return SUCCESS;
}

API CUresult cuStreamDestroy_v2(void* handle) {
    Call call;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    drain(*stream);
    streams.erase(handle);
    delete stream;
    return call.status;
}

API CUresult cuStreamSynchronize(void* handle) {
    Call call;
    if (!call) return call.status;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (CUresult status = outside_capture()) return status;
    note("synchronize");
    drain(*stream);
    return state().sticky;
}

API CUresult cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
    Call call;
    if (!call) return call.status;
    if (events.count(event) == 0 || flags != 0) return INVALID_HANDLE;
    std::shared_ptr<Moment> moment = static_cast<Event*>(event)->moment;
    // An event that was never recorded counts as over.
    return moment ? enqueue(stream, Op{{}, moment, {}}) : SUCCESS;
}

API CUresult cuStreamBeginCapture_v2(void* handle, int mode) {
    Call call;
    if (!call) return call.status;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || stream->capture || mode != 1) return INVALID_VALUE;  // thread-local
    stream->capture = std::make_shared<Graph>();
    stream->broken = false;
    captures = stream;
    return SUCCESS;
}

API CUresult cuStreamEndCapture(void* handle, void** graph) {
    Call call;
    if (!call) return call.status;
    Stream* stream = stream_of(handle);
    *graph = nullptr;
    if (stream == nullptr || !stream->capture || captures != stream) return INVALID_VALUE;
    std::shared_ptr<Graph> captured = std::move(stream->capture);
    stream->capture = nullptr;
    captures = nullptr;
    if (stream->broken) return STREAM_CAPTURE_INVALIDATED;
    note("capture of %zu commands", captured->ops.size());
    *graph = *graphs.insert(new GraphHandle{captured}).first;
    return SUCCESS;
}

API CUresult cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    Call call;
    if (!call) return call.status;
    if (graphs.count(graph) == 0 || flags != 0) return INVALID_VALUE;
    *executable = *graphs.insert(new GraphHandle{static_cast<GraphHandle*>(graph)->graph}).first;
    return SUCCESS;
}

API CUresult cuGraphLaunch(void* executable, void* stream) {
    Call call;
    if (!call) return call.status;
    if (graphs.count(executable) == 0) return INVALID_HANDLE;
    // Held until it is done: the handle may go before.
    std::shared_ptr<Graph> graph = static_cast<GraphHandle*>(executable)->graph;
    note("graph of %zu commands", graph->ops.size());
    return enqueue(stream, Op{[graph] {
                                  for (const Op& op : graph->ops) {
                                      if (op.work && state().sticky == SUCCESS) op.work();
                                  }
                              },
                              {},
                              {}});
}

static CUresult forget_graph(void* handle) {
    Call call;
    if (graphs.erase(handle) == 0) return INVALID_HANDLE;
    delete static_cast<GraphHandle*>(handle);
    return call.status;
}
API CUresult cuGraphExecDestroy(void* handle) { return forget_graph(handle); }
API CUresult cuGraphDestroy(void* handle) { return forget_graph(handle); }

API CUresult cuEventCreate(void** handle, unsigned flags) {
    Call call;
    if (!call) return call.status;
    const bool timed = (flags & 2) == 0;
    *handle = *events.insert(new Event{nullptr, timed}).first;
    return SUCCESS;
}

API CUresult cuEventDestroy_v2(void* handle) {
    Call call;
    if (events.erase(handle) == 0) return INVALID_HANDLE;
    delete static_cast<Event*>(handle);
    return call.status;
}

API CUresult cuEventRecord(void* handle, void* stream) {
    Call call;
    if (!call) return call.status;
    if (events.count(handle) == 0) return INVALID_HANDLE;
    auto moment = std::make_shared<Moment>();
    static_cast<Event*>(handle)->moment = moment;
    return enqueue(stream, Op{{}, {}, moment});
}

API CUresult cuEventSynchronize(void* handle) {
    Call call;
    if (!call) return call.status;
    if (events.count(handle) == 0) return INVALID_HANDLE;
    if (CUresult status = outside_capture()) return status;
    const std::shared_ptr<Moment> moment = static_cast<Event*>(handle)->moment;
    if (moment && moment->captured) return STREAM_CAPTURE_UNSUPPORTED;
    if (moment && !moment->over) {
        note("wait for event");
        reach(*moment);
    }
    return state().sticky;
}

API CUresult cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    Call call;
    if (!call) return call.status;
    if (events.count(from) == 0 || events.count(to) == 0) return INVALID_HANDLE;
    const Event &start = *static_cast<Event*>(from), &end = *static_cast<Event*>(to);
    if (!start.timed || !end.timed || !start.moment || !end.moment) return INVALID_HANDLE;
    if (!start.moment->over || !end.moment->over) misuse("the time between events is asked for before they came");
    *milliseconds = static_cast<float>((end.moment->seconds - start.moment->seconds) * 1e3);
    return SUCCESS;
}
