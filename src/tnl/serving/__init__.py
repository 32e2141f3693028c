"""TNL on vLLM: the plugin (:mod:`tnl.serving.plugin`), the server and the terminal chat.

Importing this package imports neither vLLM nor torch; only `states` and `modeling` need vLLM to be imported.
"""
