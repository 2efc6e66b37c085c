// Importing the object registers its ops; Python finds nothing else in it. PIX2REP_MODULE is _C_cuda, or _C_emulated for tests without a GPU.
#include <Python.h>

#define PIX2REP_JOIN_(a, b) a##b
#define PIX2REP_JOIN(a, b) PIX2REP_JOIN_(a, b)
#define PIX2REP_TEXT_(a) #a
#define PIX2REP_TEXT(a) PIX2REP_TEXT_(a)

PyMODINIT_FUNC PIX2REP_JOIN(PyInit_, PIX2REP_MODULE)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, PIX2REP_TEXT(PIX2REP_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
