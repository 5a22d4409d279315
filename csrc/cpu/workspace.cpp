// The size of the workspace. Set by pycoherence/ops/core/workspace.py.

#include "workspace.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

namespace {

std::atomic<int64_t> bytes{64 << 20};

void set_workspace(int64_t value) { bytes = value; }

}  // namespace

int64_t pc::workspace() { return bytes; }

STABLE_TORCH_LIBRARY_FRAGMENT(pycoherence_native, m) { m.def("set_workspace(int bytes) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CompositeExplicitAutograd, m) {
  m.impl("set_workspace", TORCH_BOX(&set_workspace));
}
