/* Writes a text as it is drafted and refined: what may still change goes to stderr, final text to
 * stdout.
 *
 *     cc stream.c $(pkg-config --cflags --libs redraft) -o stream
 *     ./stream models/redraft-stories-10m
 */
#include <redraft.h>
#include <stdio.h>

static int fail(void) {
  fprintf(stderr, "%s\n", redraft_last_error());
  return 1;
}

int main(int argc, char **argv) {
  const char *dir = argc > 1 ? argv[1] : "models/redraft-stories-10m";
  const char *json = "{\"prompt\": \"Once upon a time\", \"schedule\": \"did\", \"length\": 48, \"seed\": 7}";
  redraft_engine *engine = NULL;
  redraft_request *request = NULL;
  if (redraft_engine_open(dir, NULL, &engine) < 0) return fail();
  if (redraft_submit(engine, json, &request) < 0) return fail();

  redraft_event_kind kind;
  const char *text;
  while (redraft_next(request, -1, &kind, &text, NULL) == REDRAFT_OK) {
    if (kind == REDRAFT_EVENT_DELTA) printf("%s\n", text);
    if (kind == REDRAFT_EVENT_SNAPSHOT) fprintf(stderr, "%s\n", text);
  }

  const uint32_t *tokens;
  const float *confidence;
  size_t len, weak = 0;
  if (redraft_result_tokens(request, &tokens, &len) < 0) return fail();
  if (redraft_result_confidence(request, &confidence, &len) < 0) return fail();
  for (size_t i = 0; i < len; i++) weak += confidence[i] < 0.5f;
  printf("[%zu tokens, %zu of them with a confidence below a half]\n", len, weak);

  redraft_request_free(request);
  redraft_engine_close(engine);
  return 0;
}
