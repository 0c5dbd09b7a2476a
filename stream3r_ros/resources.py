"""Find the package's own launch and configuration files, however it was installed."""

from pathlib import Path

from stream3r_core.errors import DataError

PACKAGE = 'stream3r_ros'


def share_folder() -> Path:
    """Return the folder that holds ``package.xml``, ``config/`` and ``launch/`` of this package.

    That is the checkout for a source tree, an editable install and ``colcon --symlink-install``,
    and the nearest ``share/stream3r_ros`` above the installed modules for everything else: a
    virtual environment, a user install, a colcon or a ROS prefix.
    """
    for parent in Path(__file__).resolve().parents[1:]:
        for folder in (parent, parent / 'share' / PACKAGE):
            if (folder / 'package.xml').is_file() and (folder / 'config').is_dir():
                return folder
    raise DataError(
        f'the shared files of {PACKAGE} (package.xml, config/) are neither beside nor above '
        f'{Path(__file__).parent}: the installation is incomplete, install the package again'
    )


def resource(name: str) -> Path:
    """Return the path of a shipped file, such as ``config/reconstruct.yaml``.

    Raises :class:`DataError` with the files that exist instead when there is none of this name.
    """
    path = share_folder() / name
    if not path.is_file():
        there = ', '.join(sorted(p.name for p in path.parent.glob('*'))) or 'nothing'
        raise DataError(f'{name} is not part of this installation ({path}); there: {there}')
    return path
