"""ms-swift's plugin, in a folder of its own: ms-swift puts it first on ``sys.path``, where a module beside the plugin,
such as ``lightning``, would hide the library of that name."""
