"Package metadata comes from settings.ini, which nbdev also reads."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
# hpsv2 pins pytest and protobuf, so it stays out of `all`: the score itself only needs open_clip.
extras['all'] = sorted({r for k, v in extras.items() if k not in ('dev', 'hpsv2') for r in v})

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['arpo_nb', 'arpo_nb.*']), package_data={'arpo_nb': ['assets/*', 'py.typed']},
    entry_points={'console_scripts': ['arpo=arpo_nb.training.launch:arpo'],
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    zip_safe=False,
)
