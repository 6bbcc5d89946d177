from tests.deploy.schemas import make

make()
