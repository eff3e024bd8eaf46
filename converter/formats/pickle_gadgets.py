"""Names that only a malicious pickle has: functions that run code, read or write files, or lead to such functions.

The list is a courtesy: a file with one of these names is refused as hostile. The list protects nobody, as no list of
names is complete. The protection is that the reader imports and calls nothing, whatever the names are.
"""

from __future__ import annotations

from itertools import accumulate

_MAX_PARTS = 8

# All names of these modules and of the modules in them.
_MODULES = frozenset(
    name
    for line in """
    os posix nt subprocess _posixsubprocess pty commands popen2 multiprocessing threading asyncio concurrent _thread
    thread importlib imp runpy pkgutil zipimport pip venv ensurepip sys gc atexit marshal pickle _pickle cPickle shelve
    yaml bdb pdb cProfile timeit doctest unittest pydoc codeop idlelib lib2to3 linecache compileall py_compile
    rlcompleter _aix_support _osx_support _pyrepl cgitb mailcap getpass tkinter
    ctypes _ctypes shutil tempfile sqlite3 zipfile tarfile distutils.file_util distutils.spawn
    test.support socket ssl urllib.request urllib2 http httplib requests aiohttp xmlrpc webbrowser smtplib ftplib
    imaplib poplib nntplib telnetlib socketserver SocketServer
    numpy.testing numpy.f2py
    torch.hub torch.jit torch.package torch.classes torch.ops torch.distributed.rpc torch.utils.bottleneck
    torch.utils.collect_env torch.utils.cpp_extension torch.utils._config_module torch.utils.data.datapipes.utils
    torch._dynamo.guards torch._inductor.codecache torch.fx.experimental.symbolic_shapes
    """.splitlines()
    for name in line.split()
)
# Names in modules that also have harmless names.
_BUILTINS = "eval exec compile open getattr setattr delattr globals locals vars __import__ map filter input breakpoint"
_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": _BUILTINS,
        "__builtin__": f"{_BUILTINS} execfile file apply reduce",
        "types": "FunctionType CodeType",
        "itertools": "starmap",
        "functools": "reduce singledispatch",
        "operator": "attrgetter itemgetter methodcaller call",
        "_operator": "attrgetter itemgetter methodcaller call",
        "io": "open open_code FileIO",
        "_io": "open open_code FileIO",
        "codecs": "open",
        "code": "InteractiveInterpreter InteractiveConsole interact",
        "cmd": "Cmd",
        "profile": "run runctx Profile",
        "trace": "Trace",
        "site": "addpackage addsitedir",
        "signal": "signal",
        "collections": "_sys",
        "platform": "popen _syscmd_ver _syscmd_file",
        "urllib": "urlopen urlretrieve URLopener FancyURLopener",
        "uuid": "_get_command_stdout",
        "logging": "FileHandler",
        "logging.config": "dictConfig fileConfig",
        "cloudpickle": "loads load",
        "dill": "loads load",
        "joblib": "load",
        "pandas": "read_pickle",
        "numpy": "load memmap fromfile save savez savetxt loadtxt genfromtxt DataSource",
        "torch": "load save from_file",
        "torch.serialization": "load save",
        "torch.storage": "_load_from_bytes",
        "torch.multiprocessing": "spawn",
        "torch.multiprocessing.reductions": "rebuild_cuda_tensor",
        "torch._utils": "_import_dotted_name",
        "torch._C": "_from_dlpack",
        "transformers": "AutoModel.from_pretrained",
    }.items()
    for name in names.split()
)


def is_gadget(module: str, name: str) -> bool:
    """Return whether only a malicious pickle refers to `module.name`."""
    full_name = f"{module}.{name}"
    parts = full_name.split(".", _MAX_PARTS)
    # A dotted name may lead from a harmless module to another one, such as torch's `os.system`.
    modules = (*accumulate(parts[:-1], "{}.{}".format), *name.split(".", _MAX_PARTS)[:-1])
    return full_name in _NAMES or any(path in _MODULES for path in modules)
