// A launcher that runs while other Python threads go on. Instead of py::gil_scoped_release, for what happens at the end of a process.
#pragma once

#include <Python.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif
#include <unistd.h>

namespace dit4dit {

// When the interpreter ends meanwhile, CPython up to 3.13 ends this thread by unwinding it, which C++ answers with abort() in the
// first destructor; it waits for the end of the process instead, as in 3.14.
template <class Work>
void without_gil(Work work) {
    struct Released {
        PyThreadState* state = PyEval_SaveThread();
        ~Released() {
#ifdef __GLIBCXX__
            try {
                PyEval_RestoreThread(state);
            } catch (const abi::__forced_unwind&) {
                for (;;) pause();
            }
#else
            PyEval_RestoreThread(state);
#endif
        }
    };
    const Released released;
    work();
}

}  // namespace dit4dit
