"""Packaging for grnb: every value comes from settings.ini, so there is one place to edit."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
lib = cfg['lib_path']
readme = here/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license=cfg['license'].upper(),
    keywords=cfg['keywords'].split(),
    packages=find_packages(include=[lib, lib + '.*']),
    package_data={lib: ['weights/*.safetensors', 'decode/*.c']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('cpu', 'gpu', 'scale', 'dev')},
    entry_points={
        'console_scripts': [f'grnb = {lib}.cli:main'],
        'nbdev': [f'{lib} = {lib}._modidx:d'],      # where nbdev finds the symbol index (doc links, `show_doc`)
    },
    zip_safe=False,
)
