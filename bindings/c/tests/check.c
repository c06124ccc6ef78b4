/* Uses every call of redraft.h as C and as C++, and provokes each error that a caller can: every
 * status but REDRAFT_ERROR_PANIC, which says that the library is wrong.
 *
 *     check MODEL_DIR EXPECTED_TEXT LENGTH KV_PAGES LONG TOO_LONG BROKEN
 *
 * EXPECTED_TEXT is what the command writes for "once upon a time", seed 7 and LENGTH tokens on the
 * CPU. KV_PAGES pages hold a text of LONG tokens, and none of TOO_LONG. BROKEN holds models that
 * lack something: `no-weights`; `loop`, whose weights are a link to themselves; `overflow`, whose
 * logits are infinite. Says nothing and ends with 0 where all is well. */
#include <redraft.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "check.c:%d: %s: ", __LINE__, #condition);      \
      fprintf(stderr, __VA_ARGS__);                                   \
      fprintf(stderr, " (last error: %s)\n", redraft_last_error());   \
      failures++;                                                     \
    }                                                                 \
  } while (0)

#define STATUS(call, expected)                               \
  do {                                                       \
    redraft_status status_ = (call);                         \
    CHECK(status_ == (expected), "status %d", (int)status_); \
  } while (0)

/* An error with this status, whose text has this word. */
#define FAILS(call, expected, word)                                                  \
  do {                                                                               \
    STATUS(call, expected);                                                          \
    CHECK(strstr(redraft_last_error(), (word)) != NULL, "no `%s` in the text", word); \
  } while (0)

static int length_of_texts = 0;
/* A model that may have written its text before anyone looks. */
static int is_tiny = 0;

/* A request for "once upon a time" with more keys. */
static redraft_request *submit(const redraft_engine *engine, const char *keys) {
  char json[512];
  redraft_request *request = NULL;
  snprintf(json, sizeof json, "{\"prompt\": \"once upon a time\", \"seed\": 7, \"length\": %d%s}", length_of_texts,
           keys);
  STATUS(redraft_submit(engine, json, &request), REDRAFT_OK);
  return request;
}

static void check_text(const redraft_request *request, const char *expected) {
  const char *text = NULL;
  size_t len = 0;
  STATUS(redraft_result_text(request, &text, &len), REDRAFT_OK);
  if (text != NULL) {
    CHECK(strcmp(text, expected) == 0, "`%s` and not `%s`", text, expected);
    CHECK(len == strlen(text), "%u bytes", (unsigned)len);
  }
}

static void check_result(const redraft_engine *engine, const char *expected) {
  redraft_request *request = submit(engine, "");
  const char *text = NULL;
  const uint32_t *tokens = NULL;
  const float *confidence = NULL, *log_prob = NULL;
  size_t len = 0, num_tokens = 0, i = 0;
  uint32_t *encoded = NULL;
  char *decoded = NULL;

  STATUS(redraft_wait(request, -1), REDRAFT_OK);
  check_text(request, expected);
  STATUS(redraft_result(request, &text, &len), REDRAFT_OK);
  CHECK(text != NULL && text[0] == '{' && strstr(text, "\"revealed_at\"") != NULL && len == strlen(text), "no object");
  STATUS(redraft_result_draft(request, &text, NULL), REDRAFT_OK);
  STATUS(redraft_result_tokens(request, &tokens, &num_tokens), REDRAFT_OK);
  CHECK(num_tokens > 0 && num_tokens <= (size_t)length_of_texts, "%u tokens", (unsigned)num_tokens);
  STATUS(redraft_result_confidence(request, &confidence, &len), REDRAFT_OK);
  CHECK(len == num_tokens, "%u values", (unsigned)len);
  STATUS(redraft_result_log_prob(request, &log_prob, &len), REDRAFT_OK);
  CHECK(len == num_tokens, "%u values", (unsigned)len);
  for (i = 0; i < num_tokens; i++) {
    CHECK(confidence[i] > 0 && confidence[i] <= 1 && log_prob[i] <= 0, "token %u", (unsigned)i);
  }
  /* A finished request has no more events, and can be waited for again. */
  STATUS(redraft_next(request, 0, NULL, NULL, NULL), REDRAFT_END);
  STATUS(redraft_wait(request, 0), REDRAFT_OK);

  STATUS(redraft_detokenize(engine, tokens, num_tokens, &decoded), REDRAFT_OK);
  CHECK(decoded != NULL && strncmp(decoded, expected, strlen(expected)) == 0, "%s", decoded);
  redraft_free(decoded);
  STATUS(redraft_tokenize(engine, "once upon a time", &encoded, &len), REDRAFT_OK);
  CHECK(len > 0, "no tokens");
  STATUS(redraft_detokenize(engine, encoded, len, &decoded), REDRAFT_OK);
  CHECK(decoded != NULL && strcmp(decoded, "once upon a time") == 0, "%s", decoded);
  redraft_free(decoded);
  redraft_free(encoded);
  STATUS(redraft_detokenize(engine, NULL, 0, &decoded), REDRAFT_OK);
  CHECK(decoded != NULL && decoded[0] == 0, "%s", decoded);
  redraft_free(decoded);
  STATUS(redraft_request_free(request), REDRAFT_OK);
}

/* Deltas join to the text, whoever reads them: by waiting, by looking, by callback. */
struct seen {
  char text[65536];
  int deltas, snapshots, ends;
  redraft_event_kind last;
  redraft_request *freed_inside;
};

static void see(struct seen *seen, redraft_event_kind kind, const char *text, size_t len) {
  CHECK(strlen(text) == len, "%u bytes", (unsigned)len);
  CHECK(seen->ends == 0, "an event after the end");
  seen->last = kind;
  if (kind == REDRAFT_EVENT_DELTA) {
    strcat(seen->text, text);
    seen->deltas++;
  } else if (kind == REDRAFT_EVENT_SNAPSHOT) {
    CHECK(strstr(text, "\"remasked\"") != NULL, "%s", text);
    seen->snapshots++;
  } else {
    seen->ends++;
  }
}

static void on_event(void *user_data, redraft_event_kind kind, const char *text, size_t len) {
  struct seen *seen = (struct seen *)user_data;
  see(seen, kind, text, len);
  if (seen->freed_inside != NULL) {
    redraft_request *request = seen->freed_inside;
    seen->freed_inside = NULL;
    FAILS(redraft_wait(request, -1), REDRAFT_ERROR_STATE, "callback");
    FAILS(redraft_next(request, 0, NULL, NULL, NULL), REDRAFT_ERROR_STATE, "callback");
    STATUS(redraft_request_free(request), REDRAFT_OK);
  }
}

static void check_events(const redraft_engine *engine, const char *expected) {
  static struct seen seen[4];
  redraft_request *requests[4];
  redraft_status status = REDRAFT_OK;
  redraft_event_kind kind = REDRAFT_EVENT_DELTA;
  const char *text = NULL;
  size_t len = 0;
  int i = 0;
  memset(seen, 0, sizeof seen);
  for (i = 0; i < 4; i++) requests[i] = submit(engine, "");

  while ((status = redraft_next(requests[0], 60000, &kind, &text, &len)) == REDRAFT_OK) see(&seen[0], kind, text, len);
  CHECK(status == REDRAFT_END, "status %d", (int)status);
  /* The others ran beside it and may have ended, and so may a short one. */
  CHECK(seen[0].snapshots > 0 || is_tiny, "no snapshot");
  while ((status = redraft_next(requests[1], 1, &kind, &text, &len)) >= 0 && status != REDRAFT_END) {
    if (status == REDRAFT_OK) see(&seen[1], kind, text, len);
  }
  CHECK(status == REDRAFT_END, "status %d", (int)status);
  STATUS(redraft_set_callback(requests[2], on_event, &seen[2]), REDRAFT_OK);
  FAILS(redraft_set_callback(requests[2], on_event, &seen[2]), REDRAFT_ERROR_STATE, "callback");
  seen[3].freed_inside = requests[3];
  STATUS(redraft_set_callback(requests[3], on_event, &seen[3]), REDRAFT_OK);
  STATUS(redraft_wait(requests[2], 60000), REDRAFT_OK);
  for (i = 0; i < 3; i++) {
    CHECK(strcmp(seen[i].text, expected) == 0, "`%s` and not `%s`", seen[i].text, expected);
    CHECK(seen[i].deltas > 0 && seen[i].ends == 1 && seen[i].last == REDRAFT_EVENT_DONE, "request %d", i);
    check_text(requests[i], expected);
    STATUS(redraft_request_free(requests[i]), REDRAFT_OK);
  }
}

static void check_infill(const redraft_engine *engine) {
  redraft_request *request = NULL;
  const char *text = NULL;
  STATUS(redraft_submit(engine, "{\"infill\": \"the [____:3] sat on the mat.\", \"seed\": 1}", &request), REDRAFT_OK);
  STATUS(redraft_wait(request, -1), REDRAFT_OK);
  STATUS(redraft_result_text(request, &text, NULL), REDRAFT_OK);
  CHECK(text != NULL && strncmp(text, "the", 3) == 0 && strstr(text, " sat on the mat.") != NULL, "%s", text);
  STATUS(redraft_request_free(request), REDRAFT_OK);
}

static void check_cancel(const redraft_engine *engine, const char *long_length) {
  char json[256];
  redraft_status status = REDRAFT_OK;
  redraft_request *request = NULL;
  const char *text = NULL;
  snprintf(json, sizeof json, "{\"prompt\": \"one day\", \"length\": %s, \"ignore_eos\": true}", long_length);
  STATUS(redraft_submit(engine, json, &request), REDRAFT_OK);
  FAILS(redraft_result(request, &text, NULL), REDRAFT_ERROR_STATE, "not finished");
  status = redraft_wait(request, 0);
  CHECK(status == REDRAFT_TIMEOUT || (is_tiny && status == REDRAFT_OK), "status %d", (int)status);
  STATUS(redraft_cancel(request), REDRAFT_OK);
  STATUS(redraft_wait(request, -1), REDRAFT_OK);
  STATUS(redraft_result(request, &text, NULL), REDRAFT_OK);
  CHECK(text != NULL && (is_tiny || strstr(text, "\"finish\":\"cancelled\"") != NULL), "%.200s", text);
  STATUS(redraft_request_free(request), REDRAFT_OK);
  /* A request that is freed in flight is cancelled. */
  STATUS(redraft_submit(engine, json, &request), REDRAFT_OK);
  STATUS(redraft_request_free(request), REDRAFT_OK);
}

/* Waits once the other thread leaves it its turn. */
static void *wait_for_ever(void *request) {
  redraft_status status = REDRAFT_ERROR_STATE;
  while (status == REDRAFT_ERROR_STATE) status = redraft_wait((redraft_request *)request, -1);
  CHECK(status == REDRAFT_OK, "status %d", (int)status);
  return NULL;
}

/* One thread waits, a second one is refused, and cancelling ends the wait. */
static void check_threads(const redraft_engine *engine, const char *long_length) {
  char json[256];
  redraft_request *request = NULL;
  const char *text = NULL;
  redraft_status status = REDRAFT_OK;
  pthread_t thread;
  snprintf(json, sizeof json, "{\"prompt\": \"one day\", \"length\": %s, \"ignore_eos\": true}", long_length);
  STATUS(redraft_submit(engine, json, &request), REDRAFT_OK);
  if (pthread_create(&thread, NULL, wait_for_ever, request) != 0) exit(2);
  while ((status = redraft_wait(request, 0)) == REDRAFT_TIMEOUT) {
  }
  /* A text that is written faster than a thread starts shows nothing. */
  if (status != REDRAFT_OK) {
    CHECK(status == REDRAFT_ERROR_STATE && strstr(redraft_last_error(), "another thread") != NULL, "%d", (int)status);
  }
  STATUS(redraft_cancel(request), REDRAFT_OK);
  pthread_join(thread, NULL);
  STATUS(redraft_result(request, &text, NULL), REDRAFT_OK);
  STATUS(redraft_request_free(request), REDRAFT_OK);
}

static void check_texts(const redraft_engine *engine) {
  char *text = NULL;
  double *nll = NULL;
  size_t len = 0, i = 0;
  STATUS(redraft_model_info(engine, &text), REDRAFT_OK);
  CHECK(text != NULL && strstr(text, "\"architecture\"") != NULL, "%s", text);
  redraft_free(text);
  STATUS(redraft_stats(engine, &text), REDRAFT_OK);
  CHECK(text != NULL && strstr(text, "\"kv_pages\"") != NULL, "%s", text);
  redraft_free(text);
  STATUS(redraft_device_name(engine, &text), REDRAFT_OK);
  CHECK(text != NULL && strncmp(text, "cpu", 3) == 0, "%s", text);
  redraft_free(text);
  STATUS(redraft_score(engine, "once upon", &nll, &len), REDRAFT_OK);
  CHECK(len > 0, "no numbers");
  for (i = 0; i < len; i++) CHECK(nll[i] > 0 && nll[i] < 50, "%f", nll[i]);
  redraft_free(nll);
  redraft_free(NULL);
}

/* Infinite logits: the forward fails, and every call for the request says so. */
static void check_overflow(const char *dir) {
  redraft_engine *engine = NULL;
  redraft_request *request = NULL;
  redraft_event_kind kind = REDRAFT_EVENT_DELTA;
  redraft_status status = REDRAFT_OK;
  const char *text = NULL;
  STATUS(redraft_engine_open(dir, "{\"device\": \"cpu\", \"threads\": 1}", &engine), REDRAFT_OK);
  if (engine == NULL) return;
  STATUS(redraft_submit(engine, "{\"prompt\": [1, 2], \"length\": 4}", &request), REDRAFT_OK);
  while ((status = redraft_next(request, -1, &kind, &text, NULL)) == REDRAFT_OK && kind != REDRAFT_EVENT_FAILED) {
  }
  CHECK(status == REDRAFT_OK && strstr(text, "finite") != NULL, "status %d", (int)status);
  STATUS(redraft_next(request, -1, NULL, NULL, NULL), REDRAFT_END);
  FAILS(redraft_wait(request, -1), REDRAFT_ERROR_KERNEL, "finite");
  FAILS(redraft_result(request, &text, NULL), REDRAFT_ERROR_KERNEL, "finite");
  STATUS(redraft_request_free(request), REDRAFT_OK);
  STATUS(redraft_engine_close(engine), REDRAFT_OK);
}

static void check_errors(const char *dir, const char *broken, const char *too_long, const redraft_engine *engine) {
  char json[256], path[512];
  redraft_engine *none = (redraft_engine *)&failures;
  redraft_request *request = (redraft_request *)&failures;
  const char *text = NULL;
  uint32_t *tokens = NULL;
  size_t len = 0;
  char *owned = NULL;

  FAILS(redraft_engine_open(NULL, NULL, &none), REDRAFT_ERROR_ARGUMENT, "dir: expected a text, found NULL");
  FAILS(redraft_engine_open("\xff", NULL, &none), REDRAFT_ERROR_ARGUMENT, "UTF-8");
  FAILS(redraft_engine_open(dir, NULL, NULL), REDRAFT_ERROR_ARGUMENT, "engine");
  FAILS(redraft_engine_open("no/such/directory", NULL, &none), REDRAFT_ERROR_CONFIG, "no/such/directory");
  snprintf(path, sizeof path, "%s/no-weights", broken);
  FAILS(redraft_engine_open(path, NULL, &none), REDRAFT_ERROR_WEIGHTS, "safetensors");
  CHECK(none == NULL, "a handle after an error");
  snprintf(path, sizeof path, "%s/loop", broken);
  FAILS(redraft_engine_open(path, NULL, &none), REDRAFT_ERROR_IO, "loop/model.safetensors: ");
  snprintf(path, sizeof path, "%s/overflow", broken);
  check_overflow(path);
  FAILS(redraft_engine_open(dir, "{\"devise\": 1}", &none), REDRAFT_ERROR_REQUEST, "devise");
  FAILS(redraft_engine_open(dir, "{\"device\": \"cuda:77\"}", &none), REDRAFT_ERROR_DEVICE, "");
  FAILS(redraft_engine_open(dir, "{\"tokenizer\": \"no.json\"}", &none), REDRAFT_ERROR_TOKENIZER, "no.json");
  STATUS(redraft_engine_close(NULL), REDRAFT_OK);

  FAILS(redraft_submit(NULL, "{}", &request), REDRAFT_ERROR_ARGUMENT, "engine: expected a handle, found NULL");
  FAILS(redraft_submit(engine, NULL, &request), REDRAFT_ERROR_ARGUMENT, "request_json");
  FAILS(redraft_submit(engine, "{\"prompt\": \"\xc3\"}", &request), REDRAFT_ERROR_ARGUMENT, "UTF-8");
  FAILS(redraft_submit(engine, "{}", NULL), REDRAFT_ERROR_ARGUMENT, "request");
  FAILS(redraft_submit(engine, "{}", &request), REDRAFT_ERROR_REQUEST, "expected one of the keys");
  CHECK(request == NULL, "a handle after an error");
  FAILS(redraft_submit(engine, "{\"prompt\": \"a\", \"top_p\": 3}", &request), REDRAFT_ERROR_REQUEST, "top_p");
  FAILS(redraft_submit(engine, "{\"prompt\": \"a\", \"schedule\": \"best\"}", &request), REDRAFT_ERROR_REQUEST, "presets");
  snprintf(json, sizeof json, "{\"prompt\": \"a\", \"length\": %s}", too_long);
  FAILS(redraft_submit(engine, json, &request), REDRAFT_ERROR_OUT_OF_PAGES, "pages");

  FAILS(redraft_next(NULL, 0, NULL, NULL, NULL), REDRAFT_ERROR_ARGUMENT, "request");
  FAILS(redraft_wait(NULL, 0), REDRAFT_ERROR_ARGUMENT, "request");
  FAILS(redraft_cancel(NULL), REDRAFT_ERROR_ARGUMENT, "request");
  FAILS(redraft_set_callback(NULL, on_event, NULL), REDRAFT_ERROR_ARGUMENT, "request");
  FAILS(redraft_result(NULL, &text, NULL), REDRAFT_ERROR_ARGUMENT, "request");
  STATUS(redraft_request_free(NULL), REDRAFT_OK);
  FAILS(redraft_tokenize(engine, NULL, &tokens, &len), REDRAFT_ERROR_ARGUMENT, "text");
  FAILS(redraft_tokenize(engine, "a", NULL, &len), REDRAFT_ERROR_ARGUMENT, "numbers");
  FAILS(redraft_detokenize(engine, NULL, 3, &owned), REDRAFT_ERROR_ARGUMENT, "tokens");
  FAILS(redraft_model_info(engine, NULL), REDRAFT_ERROR_ARGUMENT, "text");
  FAILS(redraft_score(engine, "", NULL, &len), REDRAFT_ERROR_ARGUMENT, "numbers");
  {
    double *nll = NULL;
    FAILS(redraft_score(engine, "", &nll, &len), REDRAFT_ERROR_REQUEST, "score");
    CHECK(nll == NULL && len == 0, "numbers after an error");
  }
  request = submit(engine, "");
  FAILS(redraft_set_callback(request, NULL, NULL), REDRAFT_ERROR_ARGUMENT, "callback");
  FAILS(redraft_result_text(request, NULL, NULL), REDRAFT_ERROR_ARGUMENT, "text");
  STATUS(redraft_request_free(request), REDRAFT_OK);
}

int main(int argc, char **argv) {
  char settings[256];
  redraft_engine *engine = NULL;
  redraft_request *left = NULL;
  static struct seen seen;
  const char *text = NULL;
  if (argc != 8) return 2;
  snprintf(settings, sizeof settings, "{\"device\": \"cpu\", \"threads\": 1, \"max_sequences\": 4, \"kv_pages\": %s}", argv[4]);
  length_of_texts = atoi(argv[3]);
  is_tiny = length_of_texts < 24;

  CHECK(redraft_last_error()[0] == 0, "an error before the first");
  CHECK(redraft_abi_version() == REDRAFT_ABI_VERSION, "%u", (unsigned)redraft_abi_version());
  CHECK(strchr(redraft_version(), '.') != NULL, "%s", redraft_version());
  STATUS(redraft_engine_open(argv[1], settings, &engine), REDRAFT_OK);
  if (engine == NULL) return 1;

  check_texts(engine);
  check_result(engine, argv[2]);
  check_events(engine, argv[2]);
  check_infill(engine);
  check_cancel(engine, argv[5]);
  check_threads(engine, argv[5]);
  check_errors(argv[1], argv[7], argv[6], engine);

  /* An engine that is closed finishes what is in flight, and requests outlive it. */
  left = submit(engine, "");
  memset(&seen, 0, sizeof seen);
  {
    redraft_request *called = submit(engine, "");
    redraft_request *late = submit(engine, "");
    STATUS(redraft_set_callback(called, on_event, &seen), REDRAFT_OK);
    STATUS(redraft_engine_close(engine), REDRAFT_OK);
    CHECK(strcmp(seen.text, argv[2]) == 0 && seen.ends == 1, "%s", seen.text);
    FAILS(redraft_set_callback(late, on_event, &seen), REDRAFT_ERROR_ENGINE_GONE, "closed");
    STATUS(redraft_request_free(called), REDRAFT_OK);
    STATUS(redraft_request_free(late), REDRAFT_OK);
  }
  STATUS(redraft_wait(left, 0), REDRAFT_OK);
  check_text(left, argv[2]);
  STATUS(redraft_result(left, &text, NULL), REDRAFT_OK);
  STATUS(redraft_request_free(left), REDRAFT_OK);
  return failures == 0 ? 0 : 1;
}
