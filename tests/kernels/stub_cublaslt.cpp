// A cuBLASLt over the stub driver, for the ceilings of a device: it checks the description, the
// layouts and the addresses that it is given, and counts products. Environment:
//   STUB_BLAS_FAIL  NAME=STATUS: the function cublasLtNAME answers with that status
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>

static int failure(const char* name) {
    const char* asked = getenv("STUB_BLAS_FAIL");
    const size_t length = strlen(name);
    return asked && !strncmp(asked, name, length) && asked[length] == '=' ? atoi(asked + length + 1) : 0;
}
#define CALL(name, ...)               \
    int cublasLt##name(__VA_ARGS__) { \
        if (int status = failure(#name)) return status;

enum { INVALID = 7, R_32F = 0, R_16BF = 14, COMPUTE_32F = 68 };
static const uint64_t MAGIC = 0x616c676f72697468;

struct Desc { int compute, scale, transposed_a; };
struct Layout { int type; uint64_t rows, columns; int64_t ld; };
struct Algorithm { uint64_t data[8]; };
struct Proposal { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

static std::set<void*> live;
static int products, queries;
static struct Balance {
    ~Balance() { printf("stub: %d products and %d queries by the library, %zu of its handles left\n", products, queries, live.size()), fflush(stdout); }
} balance;

// Of the stub driver, which is open by now.
template <typename F> static F* driver(const char* name) { return (F*)dlsym(dlopen("libcuda.so", RTLD_NOW), name); }
static bool inside(uint64_t address, size_t bytes) { return driver<bool(size_t, size_t)>("stub_inside")(address, bytes); }

template <typename T> static int make(T** handle, T value) { return live.insert(*handle = new T(value)), 0; }
template <typename T> static int destroy(T* handle) { return live.erase(handle) ? (delete handle, 0) : INVALID; }

static size_t size_of(int type) { return type == R_32F ? 4 : 2; }
static bool holds(const Layout* layout, uint64_t address) {
    return layout->ld >= (int64_t)layout->rows && address % 256 == 0 && inside(address, ((layout->columns - 1) * layout->ld + layout->rows) * size_of(layout->type));
}

// op(A) (m x k) and op(B) (k x n) make D (m x n), in types that the library documents.
static bool possible(const Desc* desc, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    for (const void* handle : {(const void*)desc, (const void*)a, (const void*)b, (const void*)c, (const void*)d})
        if (!live.count((void*)handle)) return false;
    const uint64_t m = desc->transposed_a ? a->columns : a->rows, k = desc->transposed_a ? a->rows : a->columns;
    const uint64_t n = b->columns, inner = b->rows;
    return desc->compute == COMPUTE_32F && desc->scale == R_32F && a->type == R_16BF && b->type == R_16BF && (d->type == R_32F || d->type == R_16BF) && c->type == d->type &&
           k == inner && d->rows == m && d->columns == n && c->rows == m && c->columns == n && c->ld == d->ld;
}

extern "C" {
CALL(Create, Desc** library) return make(library, Desc{}); }
int cublasLtDestroy(Desc* library) { return destroy(library); }
CALL(MatmulDescCreate, Desc** desc, int compute, int scale) return make(desc, Desc{compute, scale, 0}); }
CALL(MatmulDescSetAttribute, Desc* desc, int which, const void* value, size_t bytes)
    if (!live.count(desc) || which != 3 || bytes != 4) return INVALID;
    return memcpy(&desc->transposed_a, value, 4), 0;
}
int cublasLtMatmulDescDestroy(Desc* desc) { return destroy(desc); }
CALL(MatrixLayoutCreate, Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) return make(layout, Layout{type, rows, columns, ld}); }
int cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }
CALL(MatmulPreferenceCreate, size_t** preference) return make(preference, (size_t)0); }
CALL(MatmulPreferenceSetAttribute, size_t* preference, int which, const void* value, size_t bytes)
    if (which != 1 || bytes != 8) return INVALID;
    return memcpy(preference, value, 8), 0;
}
int cublasLtMatmulPreferenceDestroy(size_t* preference) { return destroy(preference); }
CALL(MatmulAlgoGetHeuristic, size_t*, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d, size_t* preference, int wanted, Proposal* proposals, int* given)
    if (!possible(desc, a, b, c, d) || wanted != 1) return INVALID;
    ++queries;
    *proposals = Proposal{{{MAGIC, d->rows, d->columns}}, *preference, 0, 1.0f, {}};
    return *given = 1, 0;
}
CALL(Matmul, size_t* library, Desc* desc, const float* alpha, uint64_t a, Layout* al, uint64_t b, Layout* bl, const float* beta, uint64_t c, Layout* cl, uint64_t d, Layout* dl, const Algorithm* algorithm, uint64_t workspace, size_t workspace_bytes, size_t stream)
    if (!live.count(library) || !possible(desc, al, bl, cl, dl) || stream != 23) return INVALID;
    if (algorithm->data[0] != MAGIC || algorithm->data[1] != dl->rows || algorithm->data[2] != dl->columns) return INVALID;
    if (!holds(al, a) || !holds(bl, b) || !holds(cl, c) || !holds(dl, d) || !inside(workspace, workspace_bytes)) return INVALID;
    ++products;
    driver<void(const char*, const std::function<void()>&)>("stub_enqueue")("cublasLtMatmul", [] {});
    return 0;
}
}
