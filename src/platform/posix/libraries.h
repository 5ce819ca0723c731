// The libraries that the process has loaded. Each system lists them in its own way.
#pragma once

namespace da8w4 {

// A number that is another one when a library has been loaded since. It takes tens of nanoseconds.
unsigned long long libraries_loaded();

// Calls visit(path, context) for each library until it returns true.
void visit_libraries(bool (*visit)(const char *path, void *context), void *context);

}  // namespace da8w4
