// A driver library with as many devices as STUB_DEVICES says, for tests of what is said about them. -1: cuInit finds no device.
#include <cstdlib>
#include <cstring>

static int devices() { return atoi(getenv("STUB_DEVICES")); }

extern "C" {
int cuInit(unsigned) { return devices() < 0 ? 100 : devices() == 77 ? 999 : 0; }
int cuDeviceGetCount(int* count) { return *count = devices(), 0; }
int cuDeviceGet(int* device, int ordinal) { return ordinal < devices() ? (*device = ordinal, 0) : 101; }
int cuDeviceGetName(char* name, int bytes, int) { return strncpy(name, "Stub 9000", bytes), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = (size_t)8 << 30, 0; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = which == 75 ? 9 : which == 76 ? 0 : -1, 0; }
int cuGetErrorName(int code, const char** text) { return code == 100 ? (*text = "CUDA_ERROR_NO_DEVICE", 0) : 1; }
int cuGetErrorString(int code, const char** text) { return code == 100 ? (*text = "no CUDA-capable device is detected", 0) : 1; }
}
