/* Which file a function is from, as the system's loader knows it. */
#ifndef PYDA8W4_LIBRARY_PATH_H
#define PYDA8W4_LIBRARY_PATH_H

#include <Python.h>

/* path_of_library gives a str, or NULL with an exception. */
#ifdef _WIN32
#include <windows.h>

static PyObject *path_of_library(const void *function) {
    wchar_t path[32768]; /* the longest that Windows has */
    HMODULE library;
    DWORD length = 0;
    if (GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                           (const wchar_t *)function, &library))
        length = GetModuleFileNameW(library, path, sizeof path / sizeof *path);
    if (!length) return PyErr_SetFromWindowsErr(0);
    return PyUnicode_FromWideChar(path, (Py_ssize_t)length);
}

#else
#include <dlfcn.h>

static PyObject *path_of_library(const void *function) {
    Dl_info library;
    if (dladdr(function, &library)) return PyUnicode_DecodeFSDefault(library.dli_fname);
    PyErr_SetString(PyExc_OSError, "the dynamic linker does not know where the library is");
    return NULL;
}

#endif
#endif
