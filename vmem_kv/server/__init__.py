"""The OpenAI-compatible server: HTTP in front of one `AsyncEngine`. It never touches the cache.

A request's way:

    protocol.py   bytes to HTTP, with deadlines for heads and for readers
    gate.py       size, host and key; one log line; whatever fails becomes an answer
    app.py        routes
    body.py       bytes to strict JSON
    schemas.py    JSON to a validated ask
    text.py       text to tokens
    completions.py, chat.py   the ask to engine requests, and updates back to OpenAI's shapes
    answering.py  whole answers or event streams, ended when the client goes
"""
