"""Batch files: lines in, one job per line through Kafka, one line out for each of them.

`docs/batch.md` describes files and guarantees. The modules without I/O decide: `lines`, `identity`, `index`, `plan`,
`window`, `output`, `accounting`, `progress`. `engine` connects them to Kafka and to the ports of `ports`; `files`
implements the ports for local files.
"""
