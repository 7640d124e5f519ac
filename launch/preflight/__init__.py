"""What is wrong with the nodes of a job, said before it starts: `python -m lsys.launch.preflight CONFIG --nodes N ...` on each.

One node, the host, listens on the job's port; the others come to it. Each tells what it is (`facts`), all try each other
(`exchange`), and the host judges the reports (`findings`). JSON lines over TCP, nothing is unpickled; no torch is imported.
"""
