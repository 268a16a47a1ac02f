// A module for Python: products of a prepared weight, called without ctypes. It reads torch's tensors
// through DLPack's C exchange API, and keeps to the stable parts of both interfaces.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

namespace {

// Of dlpack.h, version 1.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* prev_api;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);
  void* current_work_stream;
};

constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;
constexpr int32_t kDLCPU = 1;
constexpr const char* kExchange = "dlpack_exchange_api";
constexpr long kNotForUs = -1;  // beside the statuses of api.h

struct Product {
  decltype(DLPackExchangeAPI::view) view;
  int32_t (*multiply)(const void* bound, const void* x, int64_t rows, void* y);
  const void* bound;
  int64_t dtype;  // as in api.h
  int64_t rows, columns;
};

bool is_of(const DLTensor& t, int64_t dtype) {
  const uint8_t code = dtype == 2 ? kDLBfloat : kDLFloat, bits = dtype == 0 ? 32 : 16;
  return t.device_type == kDLCPU && t.code == code && t.bits == bits && t.lanes == 1;
}

// Rows of a tensor [..., columns] without gaps, or -1.
int64_t rows_of(const DLTensor& t, int64_t columns) {
  if (t.ndim < 1 || t.shape[t.ndim - 1] != columns) return -1;
  int64_t count = 1, rows = 1;
  for (int32_t i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return 0;
    if (t.strides && t.shape[i] != 1 && t.strides[i] != count) return -1;
    count *= t.shape[i];
    if (i < t.ndim - 1) rows *= t.shape[i];
  }
  return rows;
}

uint8_t* data_of(const DLTensor& t) { return static_cast<uint8_t*>(t.data) + t.byte_offset; }

// call(x, y): writes the product to y, and returns a status of api.h or kNotForUs.
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* p = static_cast<const Product*>(PyCapsule_GetPointer(self, nullptr));
  if (!p) return nullptr;
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "two tensors are needed: x and y"), nullptr;
  DLTensor x, y;
  if (p->view(args[0], &x) || p->view(args[1], &y)) return nullptr;
  const int64_t rows = rows_of(x, p->columns);
  if (rows < 0 || rows != rows_of(y, p->rows) || !is_of(x, p->dtype) || !is_of(y, p->dtype))
    return PyLong_FromLong(kNotForUs);
  PyThreadState* state = PyEval_SaveThread();
  const int32_t status = p->multiply(p->bound, data_of(x), rows, data_of(y));
  PyEval_RestoreThread(state);
  return PyLong_FromLong(status);
}

void release(PyObject* capsule) { free(PyCapsule_GetPointer(capsule, nullptr)); }

PyMethodDef kCall = {"call", PyCFunction(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};

// prepare(exchange, multiply, bound, dtype, rows, columns): a `call` of one weight, or None where
// the exchange API is not one that we read.
PyObject* prepare(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long multiply, bound;
  long long dtype, rows, columns;
  if (!PyArg_ParseTuple(args, "OKKLLL", &capsule, &multiply, &bound, &dtype, &rows, &columns))
    return nullptr;
  if (!PyCapsule_IsValid(capsule, kExchange)) Py_RETURN_NONE;
  const auto* exchange =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, kExchange));
  if (exchange->major != 1 || !exchange->view) Py_RETURN_NONE;
  auto* p = static_cast<Product*>(malloc(sizeof(Product)));
  if (!p) return PyErr_NoMemory();
  *p = {exchange->view, reinterpret_cast<decltype(p->multiply)>(uintptr_t(multiply)),
        reinterpret_cast<const void*>(uintptr_t(bound)), dtype, rows, columns};
  PyObject* self = PyCapsule_New(p, nullptr, release);
  if (!self) return free(p), nullptr;
  PyObject* made = PyCFunction_NewEx(&kCall, self, nullptr);
  Py_DECREF(self);
  return made;
}

PyMethodDef kFunctions[] = {{"prepare", prepare, METH_VARARGS, nullptr},
                            {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot kSlots[] = {{0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_quick_call", nullptr, 0,      kFunctions, kSlots,
                       nullptr,               nullptr,       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__quick_call(void) { return PyModuleDef_Init(&kModule); }
