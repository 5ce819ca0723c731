// The pool's threads never end, so the library must stay where it is after FreeLibrary.
#include <windows.h>

namespace da8w4 {
namespace {

__attribute__((constructor)) void keep_loaded() {
    HMODULE library;
    GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
                       reinterpret_cast<const wchar_t *>(&keep_loaded), &library);
}

}  // namespace
}  // namespace da8w4
