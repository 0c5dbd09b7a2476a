from glob import glob
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

commits = run_path('stream3r_core/commit.py')


class BuildWithCommit(build_py):
    """Builds the package with a note of its commit: an installed one has no git to ask."""

    def run(self):
        super().run()
        package = Path(self.build_lib) / 'stream3r_core'
        if package.is_dir() and not getattr(self, 'editable_mode', False):
            (package / commits['NOTE']).write_text(commits['commit_of'](Path.cwd()))


package_name = 'stream3r_ros'
train = ['accelerate', 'tensorboard']
# Sim(3) factors came with GTSAM 4.3, which has no wheel for CPython 3.10.
backend = ['gtsam>=4.3; python_version >= "3.11"', 'faiss-cpu']

setup(
    name=package_name,
    version='0.1.0',
    cmdclass={'build_py': BuildWithCommit},
    packages=find_packages(
        include=['stream3r_core', 'stream3r_core.*', 'stream3r_ros', 'stream3r_ros.*']
    ),
    package_data={
        'stream3r_core': ['weights/*', 'evaluation/*.yaml'],
        'stream3r_core.kernels': ['*.c', '*.h'],
    },
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package_name]),
        ('share/' + package_name, ['package.xml']),
        ('share/' + package_name + '/launch', glob('launch/*.launch.py')),
        ('share/' + package_name + '/config', [f for f in glob('config/*') if '.' in f]),
        ('share/' + package_name + '/config/training', glob('config/training/*')),
    ],
    python_requires='>=3.10',
    install_requires=[
        'setuptools',
        'torch>=2.5',
        'numpy',
        'safetensors',
        'huggingface_hub',
        'pyyaml',
        'pillow',
        'opencv-python-headless',
        'rosbags>=0.11',
        'tqdm',
        'matplotlib',
        'evo',
        'scipy',
        'trimesh',
    ],
    extras_require={
        'test': [
            'pytest',
            'pytest-xdist',
            'hypothesis',
            'psutil',
            'ruff',
            'triton',
            'wheel',
            *backend,
            *train,
        ],
        'backend': backend,
        'gpu': ['triton', 'flash-attn'],
        'open3d': ['open3d'],
        'viewer': ['viser'],
        'train': train,
        'ray': ['ray'],
        'rerun': ['rerun-sdk'],
        # Real ROS 2 (Jazzy) for machines without a ROS installation; x86_64 only.
        'ros': [
            'ros-rclpy[fastrtps]==7.1.6',
            'ros-std-msgs==5.3.6',
            'ros-geometry-msgs==5.3.6',
            'ros-sensor-msgs==5.3.6',
            'ros-nav-msgs==5.3.6',
            'ros-diagnostic-msgs==5.3.6',
            'ros-visualization-msgs==5.3.6',
            'ros-std-srvs==5.3.6',
            'ros-ament-flake8==0.17.3',
            'ros-ament-pep257==0.17.3',
            'flake8',
            'pydocstyle',
        ],
    },
    zip_safe=False,
    maintainer='stream3r_ros developers',
    maintainer_email='stream3r_ros@users.noreply.github.com',
    description='Live dense 3D mapping and camera tracking from one camera',
    license='Apache-2.0',
    entry_points={'console_scripts': ['stream3r = stream3r_ros.cli:main']},
)
