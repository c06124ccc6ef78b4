/* Forgets a request and a text: valgrind must say so, or the check of check.c proves nothing. */
#include <stddef.h>
#include <stdint.h>

#include <redraft.h>

/* Its variables are gone when it returns, and with them the only pointers. */
static int forget(const redraft_engine *engine) {
  redraft_request *request = NULL;
  uint32_t *tokens = NULL;
  size_t len = 0;
  if (redraft_submit(engine, "{\"prompt\": \"omer\", \"length\": 8}", &request) != REDRAFT_OK) return 1;
  if (redraft_wait(request, -1) != REDRAFT_OK) return 1;
  return redraft_tokenize(engine, "omer", &tokens, &len) != REDRAFT_OK;
}

int main(int argc, char **argv) {
  redraft_engine *engine = NULL;
  if (argc != 2) return 2;
  if (redraft_engine_open(argv[1], "{\"device\": \"cpu\", \"threads\": 1}", &engine) != REDRAFT_OK) return 3;
  if (forget(engine) != 0) return 4;
  return redraft_engine_close(engine) != REDRAFT_OK;
}
