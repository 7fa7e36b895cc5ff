"""The engine: a graph of stages, content fingerprints, a store with atomic commits, a runner.

It needs the standard library only and knows nothing about what a stage computes. It moves nodes,
artifacts and bytes.

    errors.py       the errors a user can meet, each with its exit code
    fingerprint.py  canonical JSON, digests, field-level difference of two payloads
    graph.py        nodes and their order, identity of every node, names of edges
    record.py       the one record file of an artifact
    store.py        directory store: find, resolve, begin, commit
    work.py         the work directory of a stage in progress: lock, step checkpoint
    atomic.py       durable writes, a full disk as a message
    transfer.py     adopt outside files, export an artifact with its history
    ancestry.py     lineage, verification of the hash chain, garbage collection
    provenance.py   where and from which code a run was made
    planner.py      what would run, and why
    runner.py       run it, one process per stage; what it tells as it happens and at its end
    process.py      one such process, from inside and seen from the runner
    hashes.py       hashes of large files from outside, remembered
    jsonl.py        files of JSON lines
"""
