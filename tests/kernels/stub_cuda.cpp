// A driver library without a device, for tests of everything between the engine and libcuda.
//
// It keeps what a real one promises and no more: device memory is host memory, and whatever is
// enqueued runs at the next wait, not before, so a source that is reused too early shows. Kernels
// do nothing but say how they were launched. Environment:
//   STUB_DEVICES  how many devices there are; -1: cuInit finds none, 77: cuInit fails with a code that nobody knows
//   STUB_CC       compute capability of each, 90 by default
//   STUB_DRIVER   version that the driver claims, 13000 by default
//   STUB_FAIL     NAME=CODE: the function cuNAME answers with that code
//   STUB_FULL     an allocation of that many bytes finds no room

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

static int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
static int devices() { return number("STUB_DEVICES", 0); }

static int failure(const char* name) {
    const char* asked = getenv("STUB_FAIL");
    const size_t length = strlen(name);
    return asked && !strncmp(asked, name, length) && asked[length] == '=' ? atoi(asked + length + 1) : 0;
}
#define CALL(name, ...)         \
    int cu##name(__VA_ARGS__) { \
        if (int code = failure(#name)) return code;

static const size_t TOTAL = (size_t)8 << 30;
static std::map<size_t, size_t> buffers;  // address, bytes
static size_t taken;
static int live;  // contexts, streams, modules, events, graphs and page-locked areas that nobody gave back
static std::vector<std::function<void()>> queue;
static std::vector<std::string> recorded;
static std::map<size_t, int> pending;  // launches of a graph that were enqueued and not waited for
static bool recording;
static int current;

static void drain() {
    std::vector<std::function<void()>> now;
    now.swap(queue);
    for (auto& work : now) work();
}
static void say(const std::string& line) { printf("%s\n", line.c_str()), fflush(stdout); }

// A range of device memory must lie in one buffer.
static bool inside(size_t address, size_t bytes) {
    auto next = buffers.upper_bound(address);
    if (next == buffers.begin()) return false;
    --next;
    return address + bytes <= next->first + next->second;
}

static struct Balance {
    ~Balance() { printf("stub: %zu buffers and %d handles left\n", buffers.size(), live), fflush(stdout); }
} balance;

extern "C" {
// For libraries that work on the same stream.
bool stub_inside(size_t address, size_t bytes) { return inside(address, bytes); }
void stub_enqueue(const char* line, const std::function<void()>& work) {
    if (recording) recorded.push_back(line);
    else queue.push_back(work);
}

int cuInit(unsigned) { return devices() < 0 ? 100 : devices() == 77 ? 999 : 0; }
int cuDriverGetVersion(int* version) { return *version = number("STUB_DRIVER", 13000), 0; }
int cuDeviceGetCount(int* count) { return *count = devices(), 0; }
int cuDeviceGet(int* device, int ordinal) { return ordinal < devices() ? (*device = ordinal, 0) : 101; }
int cuDeviceGetName(char* name, int bytes, int) { return strncpy(name, "Stub 9000", bytes), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, 0; }
int cuDeviceGetAttribute(int* value, int which, int) {
    const int cc = number("STUB_CC", 90);
    *value = which == 75 ? cc / 10 : which == 76 ? cc % 10 : which == 16 ? 132 : which == 97 ? 232448 : -1;
    return 0;
}
int cuGetErrorName(int code, const char** text) {
    static const std::map<int, const char*> names = {{2, "CUDA_ERROR_OUT_OF_MEMORY"},       {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"}, {100, "CUDA_ERROR_NO_DEVICE"},
                                                     {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                     {719, "CUDA_ERROR_LAUNCH_FAILED"},     {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = names.find(code);
    return found == names.end() ? 1 : (*text = found->second, 0);
}
int cuGetErrorString(int code, const char** text) { return code == 100 ? (*text = "no CUDA-capable device is detected", 0) : 1; }

CALL(DevicePrimaryCtxRetain, size_t* context, int) *context = 17, ++live; return 0; }
CALL(DevicePrimaryCtxRelease_v2, int) --live; return 0; }
CALL(CtxSetCurrent, size_t context) current = context == 17; return current ? 0 : 201; }
CALL(StreamCreate, size_t* stream, unsigned flags) *stream = 23, ++live; return flags == 1 ? 0 : 1; }
CALL(StreamDestroy_v2, size_t) --live; return 0; }
CALL(StreamSynchronize, size_t stream) return stream == 23 && !recording ? (drain(), 0) : 900; }
CALL(StreamBeginCapture_v2, size_t, int) recording = true, recorded.clear(); return 0; }
CALL(StreamEndCapture, size_t, size_t* graph) recording = false; *graph = (size_t) new std::vector<std::string>(recorded), ++live; return 0; }
CALL(GraphInstantiateWithFlags, size_t* runnable, size_t graph, unsigned long long) *runnable = (size_t) new std::vector<std::string>(*(std::vector<std::string>*)graph), ++live; return 0; }
CALL(GraphDestroy, size_t) --live; return 0; }
CALL(GraphExecDestroy, size_t runnable)
    if (pending[runnable] > 0) say("stub: a graph is destroyed while it runs");
    --live;
    return 0;
}
CALL(GraphLaunch, size_t runnable, size_t)
    ++pending[runnable];
    queue.push_back([=] {
        for (auto& line : *(std::vector<std::string>*)runnable) say("replayed " + line);
        --pending[runnable];
    });
    return 0;
}

CALL(MemAlloc_v2, size_t* address, size_t bytes)
    if (!current) return 201;
    if (bytes > TOTAL - taken || bytes == (size_t)number("STUB_FULL", 0)) return 2;
    *address = (size_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (bytes < 1 << 24) memset((void*)*address, 0, bytes);  // kernels write nothing, and results must be finite
    buffers[*address] = bytes, taken += bytes;
    return 0;
}
CALL(MemFree_v2, size_t address)
    if (!buffers.count(address) || recording) return 1;
    taken -= buffers[address], buffers.erase(address), free((void*)address);
    return 0;
}
CALL(MemGetInfo_v2, size_t* free, size_t* total) *free = TOTAL - taken, *total = TOTAL; return 0; }
CALL(MemHostAlloc, void** memory, size_t bytes, unsigned) *memory = calloc(bytes, 1), ++live; return 0; }
CALL(MemFreeHost, void* memory) free(memory), --live; return 0; }
CALL(MemcpyHtoDAsync_v2, size_t to, const void* from, size_t bytes, size_t)
    if (!inside(to, bytes)) return 1;
    queue.push_back([=] { memcpy((void*)to, from, bytes); });
    return 0;
}
CALL(MemcpyDtoHAsync_v2, void* to, size_t from, size_t bytes, size_t)
    if (!inside(from, bytes)) return 1;
    queue.push_back([=] { memcpy(to, (void*)from, bytes); });
    return 0;
}
CALL(MemcpyDtoDAsync_v2, size_t to, size_t from, size_t bytes, size_t)
    if (!inside(to, bytes) || !inside(from, bytes)) return 1;
    queue.push_back([=] { memcpy((void*)to, (void*)from, bytes); });
    return 0;
}
CALL(MemsetD32Async, size_t to, unsigned word, size_t words, size_t)
    if (!inside(to, 4 * words)) return 1;
    queue.push_back([=] { for (size_t i = 0; i < words; ++i) ((unsigned*)to)[i] = word; });
    return 0;
}

// An event is the number of entries of the queue that stood before it; the test needs only that
// waiting for it runs them.
CALL(EventCreate, size_t* event, unsigned) *event = 31, ++live; return 0; }
CALL(EventDestroy_v2, size_t) --live; return 0; }
CALL(EventRecord, size_t, size_t) return 0; }
CALL(EventSynchronize, size_t) drain(); return 0; }

CALL(ModuleLoadData, size_t* module, const char* image)
    if (memcmp(image, "\x7f" "ELF", 4)) return 200;
    *module = 41, ++live;
    return 0;
}
CALL(ModuleUnload, size_t) --live; return 0; }
CALL(ModuleGetFunction, std::string** function, size_t, const char* name) *function = new std::string(name); return 0; }
CALL(FuncGetAttribute, int* value, int which, size_t) *value = which == 1 ? 1000 : -1; return 0; }
CALL(FuncSetAttribute, std::string* function, int which, int value) say("limit " + *function + " " + std::to_string(which) + " " + std::to_string(value)); return 0; }
CALL(LaunchKernel, std::string* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared, size_t stream, unsigned char** params, void** extra)
    if (stream != 23 || extra || ty != 1 || tz != 1 || (size_t)params[0] % 8) return 1;
    char text[64];
    snprintf(text, sizeof text, "%u,%u,%u x %u, %u B: ", x, y, z, threads, shared);
    std::string line = *function + " " + text;
    for (int i = 0; i < 64; ++i) snprintf(text, sizeof text, "%02x", params[0][i]), line += text;
    if (recording) recorded.push_back(line);
    else say("launched " + line);
    return 0;
}
}
