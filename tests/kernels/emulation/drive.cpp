// Runs the calls that are named, or all that have nothing planted in them.

#include "drive.h"

#include <cstdio>

int main(int count, char** names) {
  if (count == 1) {
    for (const auto& [name, call] : pc::tests::calls()) {
      if (name.rfind("planted", 0) == 0) continue;
      call();
      std::puts(name.c_str());
    }
  }
  for (int i = 1; i < count; ++i) pc::tests::calls().at(names[i])();
}
