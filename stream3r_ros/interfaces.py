"""Build tf2_msgs/TFMessage into an environment whose ROS 2 came as wheels.

The wheels of rclpy bring the rosidl generators, and headers and libraries of most interface
packages, but not tf2_msgs. Its one message is generated from the public definition and compiled
exactly as a ROS installation does it, so that the type on the wire is the real one.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from stream3r_core.errors import MissingDependencyError, Stream3rError

PACKAGE = 'tf2_msgs'
DEFINITION = 'geometry_msgs/TransformStamped[] transforms\n'
DEPENDENCIES = ('geometry_msgs', 'std_msgs', 'builtin_interfaces', 'service_msgs')

FASTRTPS = 'rosidl_typesupport_fastrtps_c'
INTROSPECTION = 'rosidl_typesupport_introspection_c'
LIBRARY_KINDS = ('rosidl_generator_c', 'rosidl_typesupport_c', FASTRTPS, INTROSPECTION)
# rosidl opens each of these by its name: one library, the other names are links to it.
LIBRARY_NAMES = tuple(f'lib{PACKAGE}__{kind}.so' for kind in LIBRARY_KINDS)
RUNTIME_LIBRARIES = (
    'rosidl_runtime_c',
    'rosidl_typesupport_c',
    FASTRTPS,
    INTROSPECTION,
    'fastcdr',
    'rmw',
    'rcutils',
)


def ensure_tf2_msgs() -> bool:
    """Build tf2_msgs unless it can be imported; return whether it was built."""
    if find_spec(PACKAGE):
        return False
    build_tf2_msgs()
    return True


def build_tf2_msgs() -> None:
    """Generate, compile and install tf2_msgs into ``sys.prefix``.

    Raises :class:`MissingDependencyError` when the ROS 2 wheels, a compiler or Python's headers
    are missing.
    """
    if not find_spec('rosidl_generator_py'):
        raise MissingDependencyError(
            'tf2_msgs cannot be built: no ROS 2 here. Source a ROS 2 installation that has it, or '
            "install this package with its 'ros' extra (x86_64 only)"
        )
    _check_toolchain()
    with tempfile.TemporaryDirectory(prefix='tf2_msgs_') as folder:
        work = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):  # the generators talk
            _generate(work)
        _compile(work)
        _install(work)
    importlib.invalidate_caches()


def _check_toolchain() -> None:
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not shutil.which(_compiler()):
        raise MissingDependencyError(
            f'tf2_msgs must be compiled once and there is no C/C++ compiler ({_compiler()!r}): '
            'run `sudo apt install g++ python3-dev`, or set CC to a compiler, and repeat'
        )
    if not header.is_file():
        raise MissingDependencyError(
            f'tf2_msgs must be compiled once and the headers of Python are missing ({header}): '
            'run `sudo apt install python3-dev` and repeat'
        )


def _compiler() -> str:
    return os.environ.get('CC') or 'gcc'


def _generate(work: Path) -> None:
    """Write the sources into one folder per generator: some files have the same name."""
    import rosidl_generator_c
    import rosidl_generator_py
    import rosidl_generator_type_description
    import rosidl_typesupport_c
    import rosidl_typesupport_fastrtps_c
    import rosidl_typesupport_introspection_c
    from rosidl_adapter.msg import convert_msg_to_idl

    source, name = work / 'source', Path('msg/TFMessage.msg')
    (source / 'msg').mkdir(parents=True)
    (source / name).write_text(DEFINITION)
    convert_msg_to_idl(source, PACKAGE, name, source / 'msg')

    generators = {
        'rosidl_generator_type_description': (
            rosidl_generator_type_description.generate_type_hash,
        ),
        'rosidl_generator_c': (rosidl_generator_c.generate_c,),
        FASTRTPS: (rosidl_typesupport_fastrtps_c.generate_typesupport_fastrtps_c,),
        INTROSPECTION: (rosidl_typesupport_introspection_c.generate_c,),
        'rosidl_typesupport_c': (rosidl_typesupport_c.generate_c, [FASTRTPS, INTROSPECTION]),
        'rosidl_generator_py': (rosidl_generator_py.generate_py, ['rosidl_typesupport_c']),
    }
    for generator, (generate, *type_supports) in generators.items():
        output = work / generator / PACKAGE
        (output / 'msg').mkdir(parents=True)
        arguments = work / 'arguments.json'
        arguments.write_text(json.dumps(_generator_arguments(work, generator, output)))
        generate(str(arguments), *type_supports)
        _write_visibility_header(generator, output)


def _generator_arguments(work: Path, generator: str, output: Path) -> dict:
    share = Path(sys.prefix, 'share')
    source = work / 'source'
    type_hash = work / 'rosidl_generator_type_description' / PACKAGE / 'msg/TFMessage.json'
    return {
        'package_name': PACKAGE,
        'output_dir': str(output),
        'template_dir': str(share / generator / 'resource'),
        'target_dependencies': [],
        'idl_tuples': [f'{source}:msg/TFMessage.idl'],
        'ros_interface_files': [str(source / 'msg/TFMessage.msg')],
        'ros_interface_dependencies': [
            f'{package}:{idl}'
            for package in DEPENDENCIES
            for idl in (share / package).rglob('*.idl')
        ],
        'include_paths': [f'{package}:{share / package}' for package in DEPENDENCIES],
        'type_description_tuples': [f'msg/TFMessage.idl:{type_hash}'],
    }


def _write_visibility_header(generator: str, output: Path) -> None:
    """Fill in the one header that CMake, not the generator, makes in a ROS build."""
    name = f'{generator}__visibility_control.h'
    template = Path(sys.prefix, 'share', generator, 'resource', name + '.in')
    if template.is_file():
        text = template.read_text().replace('@PROJECT_NAME@', PACKAGE)
        (output / 'msg' / name).write_text(text.replace('@PROJECT_NAME_UPPER@', PACKAGE.upper()))


def _compile(work: Path) -> None:
    import numpy

    prefix = Path(sys.prefix)
    headers = prefix / 'include'
    folders = [headers, *headers.iterdir(), *(p for p in work.iterdir() if p.is_dir())]
    includes = [sysconfig.get_path('include'), numpy.get_include(), *folders]
    options = ['-shared', '-fPIC', '-O1', '-w', *(f'-I{folder}' for folder in includes)]
    libraries = [f'{package}__{kind}' for package in DEPENDENCIES for kind in LIBRARY_KINDS]
    linking = [f'-L{prefix / "lib"}', '-Wl,--as-needed']

    python_part = work / 'rosidl_generator_py' / PACKAGE
    sources = [p for suffix in ('*.c', '*.cpp') for p in work.rglob(suffix)]
    library = work / LIBRARY_NAMES[0]
    _run_compiler(
        *options,
        *(p for p in sources if python_part not in p.parents),
        *('-o', library, *linking, '-Wl,-rpath,$ORIGIN', f'-Wl,-soname,{library.name}'),
        *(f'-l{name}' for name in (*libraries, *RUNTIME_LIBRARIES)),
        '-lstdc++',
    )
    _run_compiler(
        *options,
        *(p for p in sources if python_part in p.parents),
        *('-o', python_part / f'{PACKAGE}_s__rosidl_typesupport_c.so', library, *linking),
        *('-lgeometry_msgs__rosidl_generator_py', '-lrosidl_runtime_c'),
    )


def _run_compiler(*arguments) -> None:
    run = subprocess.run([_compiler(), *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise Stream3rError(
            f'compiling tf2_msgs with {_compiler()!r} failed:\n{run.stderr.strip()}'
        )


def _install(work: Path) -> None:
    """Copy into the environment, the importable package last: its presence means all is there."""
    lib, site = Path(sys.prefix, 'lib'), Path(sysconfig.get_path('purelib'))
    shutil.copy2(work / LIBRARY_NAMES[0], lib)
    for name in LIBRARY_NAMES[1:]:
        (lib / name).unlink(missing_ok=True)
        (lib / name).symlink_to(LIBRARY_NAMES[0])
    package = work / 'rosidl_generator_py' / PACKAGE
    (package / '__init__.py').touch()
    staged = site / f'{PACKAGE}.part'
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(package, staged, ignore=shutil.ignore_patterns('*.c'))
    staged.rename(site / PACKAGE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``stream3r interfaces`` takes no options."""


def run(args: argparse.Namespace) -> int:
    """Build tf2_msgs if it is missing and say what was done."""
    built = ensure_tf2_msgs()
    print(f'tf2_msgs was built into {sys.prefix}' if built else 'tf2_msgs is already there')
    return 0
