"""`penstock serve`: an OpenAI-compatible HTTP server.

command.py      what `penstock serve` does: load, listen, drain, exit code
app.py          the routes; one function each
protocol.py     what requests may hold
completions.py  /v1/completions
chat.py         /v1/chat/completions;  tools.py: function calls, in grammar and text
sampling.py     from a request's fields to SamplingParams
replies.py      usage, log-probabilities, server-sent events, clients that leave
dispatch.py     requests on the event loop: admission, delivery, abort, drain
engine_loop.py  the engine in a thread of its own
errors.py       the error object;  gate.py: request ids, API key, body size;  logs.py;  metrics.py
"""
