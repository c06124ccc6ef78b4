// A compiler library that accepts every source and writes an image of five words, for tests of what
// happens around the compiler.
//   STUB_ARCH   the newest architecture that it knows, 120 by default
//   STUB_NVRTC  its version as 10 * major + minor, 130 by default
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

struct Program {
    std::string source, name, log, image;
};
static const int ARCHS[] = {75, 80, 86, 89, 90, 100, 120};
static int count() {
    int n = 0;
    while (n < 7 && ARCHS[n] <= number("STUB_ARCH", 120)) ++n;
    return n;
}

extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = number("STUB_NVRTC", 130) / 10, *minor = number("STUB_NVRTC", 130) % 10, 0; }
int nvrtcGetNumSupportedArchs(int* n) { return *n = count(), 0; }
int nvrtcGetSupportedArchs(int* archs) { return memcpy(archs, ARCHS, count() * sizeof(int)), 0; }
const char* nvrtcGetErrorString(int code) { return code ? "NVRTC_ERROR_STUB" : "NVRTC_SUCCESS"; }
int nvrtcCreateProgram(Program** program, const char* source, const char* name, int, const char* const*, const char* const*) {
    *program = new Program{source, name, "", ""};
    return 0;
}
int nvrtcDestroyProgram(Program** program) { return delete *program, 0; }
int nvrtcCompileProgram(Program* program, int, const char* const* options) {
    printf("stub: compiles %s with %s\n", program->name.c_str(), options[0]), fflush(stdout);
    for (const std::string macro : {"\nKERNEL(", "\nKERNEL_BOUNDS("}) {
        for (size_t at = 0; (at = program->source.find(macro, at)) != std::string::npos;) {
            at += macro.size();
            const std::string entry = program->source.substr(at, program->source.find(',', at) - at);
            program->log += "ptxas info    : Compiling entry function '" + entry + "' for 'sm_90a'\nptxas info    : Used 16 registers\n";
        }
    }
    program->image = "\x7f" "ELF of " + program->name;
    return 0;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) { return *size = program->log.size() + 1, 0; }
int nvrtcGetProgramLog(Program* program, char* log) { return memcpy(log, program->log.c_str(), program->log.size() + 1), 0; }
int nvrtcGetCUBINSize(Program* program, size_t* size) { return *size = program->image.size(), 0; }
int nvrtcGetCUBIN(Program* program, char* image) { return memcpy(image, program->image.data(), program->image.size()), 0; }
}
