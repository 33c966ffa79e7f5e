"""The command line: one small file a verb.

The top ring: may import everything, but each verb imports PyTorch only when it runs.
"""
