"""Benchmarks: how fast an operator or the engine is, against the hardware and against others in the same run.

    timing.py             contestants in alternation over rotating inputs: CUDA graphs, events, or perf_counter
    inputs.py             the rotating input sets
    roofline.py           copy bandwidth and matmul rates of this run; the floor of a call
    correct.py            the gate: no number for a result that disagrees with the reference
    peers.py, peers_flashinfer.py   public functions that compute the same, by operator
    run.py                one operator: gate, contestants, numbers
    host.py               contract and choice of an eager call, in µs
    record.py, report.py  JSON files and tables
    tune.py               times candidate launch configs, writes the tables that core/tuning.py looks up
    engine.py, engine_peer.py, shapes.py   tokens per second of penstock.LLM against transformers
    serve.py, serve_command.py   a server's latency against load: Poisson arrivals, goodput, a plot
    cli.py                penstock bench OP|all|ceilings|engine|serve

A day on a GPU is one command, benchmarks/gpu_session.py; benchmarks/file_results.py files what it brought back.

A claim of speed names the JSON file and the command that made it.
"""
