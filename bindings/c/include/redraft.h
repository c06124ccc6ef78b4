// redraft: a draft-then-refine inference engine for diffusion language models.
// Written by cbindgen from bindings/c/src; `REDRAFT_WRITE_HEADER=1 cargo test -p redraft-c` writes it anew.

#ifndef REDRAFT_H
#define REDRAFT_H

#include <stddef.h>
#include <stdint.h>

// Version of the binary interface, which the name of the shared library ends with
// (`libredraft.so.0`). Calls and numbers are only added while it stays the same.
#define REDRAFT_ABI_VERSION 0

// What a call came to. Below zero: an error, of which `redraft_last_error` has the text. Numbers
// keep their meaning; later versions may add some.
enum redraft_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Done.
  REDRAFT_OK = 0,
  // Nothing came within the time that the call was given.
  REDRAFT_TIMEOUT = 1,
  // The request is finished and its last event was told.
  REDRAFT_END = 2,
  // An argument is NULL or no UTF-8.
  REDRAFT_ERROR_ARGUMENT = -1,
  // The call does not fit the state of its handle: a result before the end, a second waiter.
  REDRAFT_ERROR_STATE = -2,
  // The model's config.json is absent, malformed or describes something unsupported.
  REDRAFT_ERROR_CONFIG = -3,
  // A weight file is absent or malformed.
  REDRAFT_ERROR_WEIGHTS = -4,
  // The tokenizer is absent, malformed, or does not fit the model.
  REDRAFT_ERROR_TOKENIZER = -5,
  // The request or the settings cannot be served as asked: the text names the key.
  REDRAFT_ERROR_REQUEST = -6,
  // The request is larger than all K/V pages together.
  REDRAFT_ERROR_OUT_OF_PAGES = -7,
  // The device is absent or refused.
  REDRAFT_ERROR_DEVICE = -8,
  // A kernel failed, or produced numbers that cannot be used.
  REDRAFT_ERROR_KERNEL = -9,
  // The operating system refused a read or a write.
  REDRAFT_ERROR_IO = -10,
  // The engine was closed, or ended, before the request did.
  REDRAFT_ERROR_ENGINE_GONE = -11,
  // A fault of the library: a panic was caught, and the text is what it said.
  REDRAFT_ERROR_PANIC = -12,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum redraft_status redraft_status;
#else
typedef int32_t redraft_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What an event says, and what its text is.
enum redraft_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Final text, after all deltas before it: they join to the text of the result.
  REDRAFT_EVENT_DELTA = 1,
  // The text as it is now, which may still change; it replaces the last snapshot. A JSON object:
  // `stage`, `step`, `text`, and for each position that has held a generated token `positions`,
  // `tokens` (null while masked), `pieces`, `confidence`; `remasked` are the positions that the
  // stage at work masked again.
  REDRAFT_EVENT_SNAPSHOT = 2,
  // The end: the result, as `redraft_result` gives it.
  REDRAFT_EVENT_DONE = 3,
  // The end: the request failed, and the text says why. `redraft_result` gives its status.
  REDRAFT_EVENT_FAILED = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum redraft_event_kind redraft_event_kind;
#else
typedef int32_t redraft_event_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A loaded model on a thread of its own. Every call but `redraft_engine_close` may come from any
// thread at any time.
typedef struct redraft_engine redraft_engine;

// A request in flight, or finished. One thread at a time may wait for it; every other call may
// come from any thread at any time, but none during or after `redraft_request_free`.
typedef struct redraft_request redraft_request;

// Is told every event of a request, in order, on a thread of the library; calls for the requests
// of one engine never overlap. `text` (of `len` bytes, and a zero after them) is valid during the
// call. The callback may make any call of this library, `redraft_request_free` of its own request
// included; it must not throw or jump out.
typedef void (*redraft_callback)(void *user_data,
                                 redraft_event_kind kind,
                                 const char *text,
                                 size_t len);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The value of REDRAFT_ABI_VERSION that the library was built with.
uint32_t redraft_abi_version(void);

// Version of the library, such as `0.1.0`. Valid for ever.
const char *redraft_version(void);

// Text of the last error in this thread, empty before the first: the file, key or argument, what
// was expected and what was found. Valid until the thread's next error.
const char *redraft_last_error(void);

// Frees a text or an array that a call gave to its caller. NULL is fine.
void redraft_free(void *memory);

// Opens a Hugging Face directory (`config.json`, `*.safetensors`, `tokenizer.json`) or a GGUF
// file.
// `settings_json` is NULL, or an object with any of `device` ("auto", "cpu", "cuda:0"), `dtype`
// ("f32", "bf16"), `weights` ("f32", "bf16", "q8", "q4"), `threads`, `max_sequences` (requests
// in flight at once, 8), `max_rows` (512), `max_positions` (of one sequence), `kv_pages`,
// `page_size`, `tokenizer` (path of a tokenizer.json), `models` (paths of more models for
// stages that name them), `joint` (a directory with a joint sampler).
//
// Errors: REDRAFT_ERROR_CONFIG, _WEIGHTS, _TOKENIZER or _IO with the file and what it lacks;
// REDRAFT_ERROR_DEVICE; REDRAFT_ERROR_REQUEST for settings, with the key.
redraft_status redraft_engine_open(const char *dir,
                                   const char *settings_json,
                                   redraft_engine **engine);

// Finishes the requests in flight (cancel them to end sooner), tells their events, and frees the
// engine. Requests stay valid until each is freed. NULL is fine.
redraft_status redraft_engine_close(redraft_engine *engine);

// What the model is: a JSON object with `architecture`, `vocab_size`, `max_length`,
// `trained_length`, `block_len`, `generates`, `autoregressive`, `warnings`. `redraft_free` frees
// it.
redraft_status redraft_model_info(const redraft_engine *engine, char **json);

// What is in flight and what was done, after the last forward: a JSON object. Never waits for the
// engine. `redraft_free` frees it.
redraft_status redraft_stats(const redraft_engine *engine, char **json);

// Device, instruction set or GPU, and threads: `cpu (avx2, 2 threads)`. `redraft_free` frees it.
redraft_status redraft_device_name(const redraft_engine *engine, char **name);

// Ids of the tokens of a text, without a first token of the model's own. `redraft_free` frees
// them.
//
// Errors: REDRAFT_ERROR_TOKENIZER.
redraft_status redraft_tokenize(const redraft_engine *engine,
                                const char *text,
                                uint32_t **tokens,
                                size_t *len);

// The text of tokens; special tokens have none. A zero byte in it is shown as U+FFFD.
// `redraft_free` frees it.
//
// Errors: REDRAFT_ERROR_TOKENIZER.
redraft_status redraft_detokenize(const redraft_engine *engine,
                                  const uint32_t *tokens,
                                  size_t len,
                                  char **text);

// Negative log-likelihood of each token of a text in nats, under the model's own factorisation.
// Waits for it; requests in flight advance meanwhile. `redraft_free` frees the numbers.
//
// Errors: REDRAFT_ERROR_REQUEST for an empty text or one that is longer than the model serves.
redraft_status redraft_score(const redraft_engine *engine,
                             const char *text,
                             double **nll,
                             size_t *len);

// Queues a request; it is batched with those in flight. `request_json` is an object with one of
// `prompt` (a text, or token ids), `messages` (a list of `{"role", "content"}`, or an object with
// `messages`, `tools`, ...), `infill` (a text with holes: `"The [____:3] sat."` has one of three
// tokens) and `canvas` (token ids, null where the model writes); `draft` is a text to refine after
// `prompt`. All other keys are optional: `schedule` (a preset, or stages), `length`, `seed`,
// `sample`, `priority`, `temperature`, `top_p`, `top_p_rule`, `top_k`, `stop` (a text or a list),
// `ignore_eos`, `stop_entropy`, `bos`. Waits until the engine has looked at it, between two
// forwards.
//
// Errors: REDRAFT_ERROR_REQUEST with the key, what was expected and what was found;
// REDRAFT_ERROR_TOKENIZER where the model has none that can be used; what ended the engine.
redraft_status redraft_submit(const redraft_engine *engine,
                              const char *request_json,
                              redraft_request **request);

// Waits for the next event, for `timeout_ms` milliseconds at most: 0 only looks, below 0 is for
// ever. `event`, `event_text` and `len` take its kind, its text (with a zero after it) and the
// bytes of the text; each may be NULL. The text is valid until the next call of this function for
// the request, or until the request is freed. REDRAFT_TIMEOUT: nothing came; REDRAFT_END: the last
// event was told.
//
// Errors: REDRAFT_ERROR_STATE where another thread waits for the request, or events go to a
// callback. A request that failed is no error of this call: it is the event REDRAFT_EVENT_FAILED.
redraft_status redraft_next(redraft_request *request,
                            int64_t timeout_ms,
                            redraft_event_kind *event,
                            const char **event_text,
                            size_t *len);

// Waits for the end of the request, for `timeout_ms` milliseconds at most: 0 only looks, below 0
// is for ever. Events that were not read are dropped, and no text is made for them; with a
// callback, returns after its last call. REDRAFT_TIMEOUT: not finished.
//
// Errors: the request's own; REDRAFT_ERROR_STATE where another thread waits for the request, and
// in a callback for a request with a callback of the same library.
redraft_status redraft_wait(redraft_request *request, int64_t timeout_ms);

// From now on events go to `callback`, with `user_data`; those that came before and were not read
// come first. One thread of the library, which the engine's first callback starts, makes all calls
// of an engine: a slow callback delays other callbacks, and never a forward. The last call says
// REDRAFT_EVENT_DONE or REDRAFT_EVENT_FAILED.
//
// Errors: REDRAFT_ERROR_STATE where the request has a callback or a thread waits for it;
// REDRAFT_ERROR_ENGINE_GONE after the engine was closed.
redraft_status redraft_set_callback(redraft_request *request,
                                    redraft_callback callback,
                                    void *user_data);

// Ends the request at the next forward: it finishes as `cancelled`, with what has been revealed.
// May be called at any time from any thread, also while another one waits.
redraft_status redraft_cancel(redraft_request *request);

// The result as the JSON object that `redraft generate --format json` prints, without what belongs
// to the engine. Valid until the request is freed.
//
// Errors, here and of the calls below: REDRAFT_ERROR_STATE before the end; the request's own where
// it failed.
redraft_status redraft_result(const redraft_request *request, const char **json, size_t *len);

// The generated text, up to the end-of-text token and the first stop text; for prompts with holes
// the whole text. `len`, which may be NULL, takes its bytes. Valid until the request is freed. A
// zero byte in the text is shown as U+FFFD.
redraft_status redraft_result_text(const redraft_request *request, const char **text, size_t *len);

// The generated text when the first stage was done; as `redraft_result_text` otherwise.
redraft_status redraft_result_draft(const redraft_request *request, const char **text, size_t *len);

// Ids of the generated tokens. Valid until the request is freed.
redraft_status redraft_result_tokens(const redraft_request *request,
                                     const uint32_t **tokens,
                                     size_t *len);

// For each generated token its probability in the forward that revealed it. Valid until the
// request is freed.
redraft_status redraft_result_confidence(const redraft_request *request,
                                         const float **confidence,
                                         size_t *len);

// For each generated token its log probability in nats, before temperature, top-k and nucleus.
// Valid until the request is freed.
redraft_status redraft_result_log_prob(const redraft_request *request,
                                       const float **log_prob,
                                       size_t *len);

// Cancels the request if it is in flight, and frees it with every text and array that it gave
// out. Its callback is not running when this returns, unless it made the call. NULL is fine.
redraft_status redraft_request_free(redraft_request *request);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* REDRAFT_H */
