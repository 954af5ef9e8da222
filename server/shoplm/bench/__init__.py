"""`shoplm bench`: an open-loop mixed load through gRPC, and offline throughput through the engine API.

    plan.py       settings and the seeded arrival times
    workload.py   whom the requests are about: real demo customers with varied cut-offs, and new customers
    calls.py      one call, and when its parts arrived
    load.py       sends the plan, open loop
    observe.py    the server's own view: /metrics before and after, CPU and memory of its processes
    summary.py    outcomes -> percentiles, goodput, verdict
    sweep.py      the load at several rates and policies: capacity, the knee, plots
    offline.py    prompt and output tokens per second, all requests at once
    launch.py     a server of its own on free loopback ports
    report.py     JSON and the readable table
    run.py        runs what the command asks for
    cli.py        the command

Latency counts from the moment at which a request was *meant* to be sent, so a stalled server or client cannot hide the
requests that it delayed (coordinated omission).
"""
